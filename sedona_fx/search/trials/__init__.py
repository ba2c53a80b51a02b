"""Judging plans: by training them, or by comparing their gradients with those of backpropagation.

Files

alignment            How well local gradients agree with the gradient of backpropagation: a score of cuts and heads,
                     without training any
descent              Settings of the SGD that trains the plans under trial
effort               Cost of the parts of searches by trial, in plain training steps, and how the guided search
                     shares its steps
gradient_comparison  The first part of the guided search: train one set of weights along random plans, and compare
                     gradients on the way
plan_tree            Many plans of one net, trained greedily at the same time; blocks that plans have in common are
                     trained once
proposals            Plans to try: all there are, or those of the rules and a random sample of the others; all
                     within the budget
step_fault           What is not finite in a training step of a search: no optimizer may step on it
successive_halving   Successive halving: train several plans at once, and drop the worse half of them twice on the
                     way
supernet             One set of weights for all plans: the net with every candidate head
tree_cost            Cost of a training step of many plans at once, in plain training steps of the net
"""

__all__: list[str] = []  # internal
