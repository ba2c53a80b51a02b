"""The default search: gradients prune the candidate cuts and heads, rollouts decide among the best plans that are left.

1. Train one set of weights for a while, along plans drawn at random
   (:mod:`~sedona_fx.search.trials.gradient_comparison`).
2. At several states on the way, compare the gradient of every (cut, head) with that of the final loss: the cosine over
   all weights before the cut, averaged over the states (:mod:`~sedona_fx.search.trials.alignment`).
3. Find the plans with the largest sums of these within the budget of memory and time, by dynamic programming.
4. Train these plans from the weights of step 1 as ``Greedy`` would, dropping half of them twice on the way; the least
   validation loss decides (:mod:`~sedona_fx.search.trials.successive_halving`). Where the cost allowed does not pay for
   an epoch of that, gradients decide alone: shorter rollouts rank plans by noise. Gradients also decide alone where
   blocks would share a parameter (tied embeddings): a block then depends on later ones, and plans could not have their
   first blocks in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.rng import seeded_init
from sedona_fx.search.guided_run import GuidedRun
from sedona_fx.search.guided_settings import GuidedSettings
from sedona_fx.search.problem.problem import Decision, Problem, Search


@dataclass(frozen=True, kw_only=True)
class Guided(GuidedSettings, Search):
    """Gradients prune, rollouts decide; with the settings of its base class."""

    needs_data: ClassVar[bool] = True

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads. Ctrl-C ends the search; it then decides by what it has seen.

        Raises:
            BudgetError: no plan keeps within the problem's limits.
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: there are not enough places to cut, or no heads to compare.
            DataError: there is no data, or an epoch of it is empty.
            SearchDivergedError: no training step, or no state whose gradients were to be compared, had finite ones.
            SettingsError: the steps or seconds do not pay for a search.
        """
        if problem.blocks == 1:
            return Decision([], [], {"search": "guided"})
        data = problem.require_data("search='guided'")
        problem.require_heads("search='guided'")
        with seeded_init(problem.seed):
            return GuidedRun(self, problem, data).decide()
