"""The plans that decoding by perturbation may end with: all of K blocks that keep within the problem's limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sedona_fx.search.problem.plan_costs import no_plan, plan_costs
from sedona_fx.search.problem.problem import Positions, Problem


@dataclass(frozen=True)
class PlanSpace:
    """Plans to choose from.

    Attributes:
        blocks: K.
        completes: whether some of the plans contains given choices: at most K - 1 (place, head) pairs by number, places
            ascending.
    """

    blocks: int
    completes: Callable[[Positions], bool]

    @classmethod
    def of(cls, problem: Problem) -> PlanSpace:
        """Return the plans of a problem that keep within its limits.

        Raises:
            BudgetError: there are none.
        """
        if problem.limits is None:
            return cls(problem.blocks, lambda choices: True)
        costs = plan_costs(problem)
        fits, head_flops = costs.fits(problem.limits), costs.heads["head_flops"]

        def completes(choices: Positions) -> bool:
            return bool(costs.best(head_flops, 1, _containing(fits, choices)))

        if not completes(()):
            raise no_plan(costs)
        return cls(problem.blocks, completes)


def _containing(fits: np.ndarray, choices: Positions) -> np.ndarray:
    """Return which blocks may be in a plan that contains some choices.

    Args:
        fits: which blocks may be in any plan, (n + 1, n + 1, heads), as
            :meth:`~sedona_fx.search.problem.plan_costs.PlanCosts.fits` returns it.
        choices: (place, head) pairs.
    """
    allowed = fits.copy()
    for place, head in choices:
        allowed[: place + 1, place + 1 :] = False  # blocks that pass over the place
        allowed[:, place, np.arange(fits.shape[2]) != head] = False
    return allowed
