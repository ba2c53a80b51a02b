"""From a model and a request to a net.

In the order of the calls: ``request`` checks what the user asked for, ``analyse`` finds the legal cuts, ``decide``
chooses (with ``choices``: what the user chose), ``provenance`` writes the plan, ``build`` makes the net.
"""
