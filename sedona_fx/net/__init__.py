"""The decoupled net: the user's model as K blocks.

``net`` is the class, ``parts`` the record it is built from; ``signature`` checks arguments, ``placing`` moves tensors
between devices, ``variants`` makes other forms of the blocks, ``exits`` is inference with heads, ``weights`` the file.

Files

accident         Notice backpropagation by accident: ``loss(net(x), y).backward()``, which trains no head and saves
                 nothing
exits            Inference with heads: early exit at the first head that is confident, and ensembles of the last
                 heads
follow           Take over into the graphs what was replaced in a net's modules, or refuse it by name
inference        What a net gives away for inference: one graph, an ONNX file, early exits, an ensemble of its heads
net              The decoupled net: the user's model as K blocks that train without waiting for each other
parallel         Refuse what would train a net in several processes, or on several devices, without knowing how it
                 trains
parts            The record of everything that a net is built from
placing          Move the tensors of a net between devices, and keep every graph consistent with that
precision_proof  Prove captured graphs again in each precision in which they run
saved            Saving a net: the folder with plan and weights, its state dict, and why it cannot be pickled
signature        The arguments of a net: bound by name, and checked against the ones that its graphs were made for
trial            Run a net's model on the example batch, for questions that the graphs cannot answer themselves
variants         Variants of a net's blocks that schedules need, such as blocks without heads; made when they are
                 first asked for
watch            Notice what was replaced in a net's modules since its graphs were made, in a few microseconds a
                 step
weights          Weight files of a net. Cuts, heads, names, shapes and dtypes are compared before anything is loaded
wrapped          Nets inside of what ``torch.compile`` returns, which has the net's parameters but not its methods
"""

__all__: list[str] = []  # internal
