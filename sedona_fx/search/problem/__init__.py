"""What a search is given, what plans cost, and the exact search over all plans.

Files

best_first       Whole plans in the order of their scores, found by extending partial plans best-first, within a
                 limit on the weight
block_seconds    Measured seconds of a training step of every stretch between places to cut, and of every candidate
                 head
dynamic_program  The exact search over all plans of a net: the best ones by additive scores, within limits
least_sums       The table of the dynamic program over plans: the least sum that the rest of a plan can have, from
                 every state
limits           Limits on a plan: bytes, FLOPs and seconds of its largest block, and FLOPs of its heads
plan_costs       What plans cost, block by block, and which of them keep within the problem's limits
problem          The interface of a search: the problem it is given, the decision it returns, and the base class it
                 extends
sampling         All plans of a net, listed or sampled, by the numbers of their places and heads
shortage         What is said where a model has fewer places to cut than the blocks asked for need
stretch_tables   Costs of all runs of stretches, as tables over (first stretch, last stretch), in time quadratic in
                 the stretches
stretches        The stretches of a net between some of its cut points, each as a block of its own without a head
work             The work of candidate heads, relative to a plain training step of the net
"""

__all__: list[str] = []  # internal
