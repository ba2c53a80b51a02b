"""SEDONA's search (Pyeon et al., ICLR 2021): bilevel optimisation of cuts and heads.

Files

bilevel       SEDONA's bilevel search, step by step: a warm-up that leaves snapshots, then meta-iterations on them
certainty     Which parts of a decision were learned, and which are ties. It decides nothing: it judges cuts that
              were chosen
decision      From a search's result to the :class:`~sedona_fx.search.problem.problem.Decision` that ``decouple``
              compiles
decode        Decoding by the learned logits alone: at which base layers to cut, and which candidate head each cut
              gets
perturbation  Decoding by perturbation: make one choice of a cut and its head hard at a time, by the least
              validation loss
plan_space    The plans that decoding by perturbation may end with: all of K blocks that keep within the problem's
              limits
relaxed_net   From a problem to the blocks of SEDONA's relaxed net, and to the losses that train them
result        What SEDONA's search has done and learned, while it runs, in the end, or when it cannot go on
search_cost   What SEDONA's search costs, and how many steps of each kind a given cost pays for
search_state  Everything that SEDONA's search changes from step to step: saved to a journal, and restored from it
sedona        SEDONA's search: learn by gradient after which base layers to cut, and with which heads
settings      Settings of SEDONA's search, checked on construction
snapshots     Snapshots of the relaxed net: kept in memory up to a limit in bytes, and on disk beyond it
steps         The two kinds of step that SEDONA's search is made of. Neither lets an infinite or NaN gradient into
              the weights
variables     alpha and beta, the variables that SEDONA learns, with the optimizer that updates them
"""

__all__: list[str] = []  # internal
