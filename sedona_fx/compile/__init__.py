"""From a model and a request to a net.

In the order of the calls: ``request`` checks what the user asked for, ``analyse`` finds the legal cuts, ``decide``
chooses (with ``choices``: what the user chose), ``provenance`` writes the plan, ``build`` makes the net.

Files

analyse     model -> ANALYSED graphs: where the model may be cut, and what a head has to fit there
build       ANALYSED graphs and a plan -> net: new heads, LOWERED graphs, block graphs, costs
choices     What the user chose: cuts by name, heads, a plan. Names are resolved to cut points, or refused with the
            reason
copying     The copy of the user's model that a net owns: with the hooks on its parameters, and with no way back to
            the original
decide      The decision about cuts and heads: by the user's plan, by the user's cuts, or by a search
head_loss   Try the model's loss on what a head gives, and name the fields of the output that it misses there
head_reach  Tell of heads of the user's own that read so little of an activation that weights of their block learn
            nothing
provenance  The plan of a decision: what is saved with the net
request     What the user asked of ``decouple`` or ``load``: the arguments checked one by one, and kept in one
            record
saved_loss  The losses of a net that is loaded, compared with those that its plan names; functions are not saved
"""

__all__: list[str] = []  # internal
