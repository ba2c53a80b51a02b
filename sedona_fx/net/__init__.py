"""The decoupled net: the user's model as K blocks.

``net`` is the class, ``parts`` the record it is built from; ``signature`` checks arguments, ``placing`` moves tensors
between devices, ``variants`` makes other forms of the blocks, ``exits`` is inference with heads, ``weights`` the file.
"""
