"""From a model and a request to a net.

In the order of the calls: ``request`` checks what the user asked for, ``analyse`` finds the legal cuts, ``decide``
chooses (with ``choices``: what the user chose), ``provenance`` writes the plan, ``build`` makes the net.

Files

analyse         model -> ANALYSED graphs: where the model may be cut, and what a head has to fit there
arguments       Single arguments of ``decouple``, checked and in the form that the compiler takes: plan, devices,
                sizes, search
build           ANALYSED graphs and a plan -> net: new heads, LOWERED graphs, block graphs, costs
check_loss      Try the losses of a net before anything is searched: on the model's own output, and on what a head
                gives
choices         What the user chose: cuts by name, heads, a plan. Names are resolved to cut points, or refused with
                the reason
contexts        What a head has to fit behind a cut: shapes with the batch first, dtypes, and how the model itself
                has both
copying         The copy of the user's model that a net owns: with the hooks on its parameters, and with no way back
                to the original
crossing_limit  How many activations may cross at a cut: as few as let the blocks share the work about as evenly as
                any number does
decide          The decision about cuts and heads: by the user's plan, by the user's cuts, or by a search
given_fields    Fields of the output that heads are given: targets that a part of the forward computes without a
                gradient
head_reach      Tell of heads of the user's own that read so little of an activation that weights of their block
                learn nothing
provenance      The plan of a decision: what is saved with the net
request         What the user asked of ``decouple`` or ``load``: the arguments checked one by one, and kept in one
                record
saved_loss      The losses of a net that is loaded, compared with those that its plan names; functions are not saved
uneven          Why blocks are uneven, or fewer than were asked for, and what would help: for ``print(net)`` and for
                errors
where           Where the user allows cuts
whole_batch     What the model returned for a few examples, in the shapes that it returns for the whole batch
"""

__all__: list[str] = []  # internal
