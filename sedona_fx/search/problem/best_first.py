"""Whole plans in the order of their scores, found by extending partial plans best-first, within a limit on the weight.

A partial plan is the first few (place, head) pairs of a plan. A heap holds partial plans in the order of (a lower bound
on the score of all their completions, plan), and the first one is extended by every next cut. Whole plans leave the
heap in the order of (score, plan), for two reasons: bounds never fall when a plan is extended, and a tuple sorts before
the tuples that it is a beginning of.

With a limit on the weight this is the constrained shortest path problem. Three things keep the number of partial plans
small, and none of them loses a plan that is wanted:

- Feasibility: a partial plan is dropped if its weight and the least weight of the rest exceed the limit.
- Bounds: beside the least score of the rest, the best Lagrangian relaxation, which adds the weight above the limit to
  the score (Handler and Zang 1980, "A dual algorithm for the constrained shortest path problem").
- Dominance: of partial plans in one state (same cuts left, same next stretch), one is dropped if as many others as
  plans are wanted come before it in the order of (score, plan) and weigh no more. Each of its completions comes after
  as many other plans, those that complete the others in the same way.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedona_fx.search.problem.least_sums import LeastSums, PlanSums
from sedona_fx.search.problem.problem import Positions


@dataclass(frozen=True)
class WeightLimit:
    """The largest weight that a plan may have.

    Attributes:
        sums: weights, at least 0.
        rest: the table of `sums`.
        limit: on the sum of a whole plan.
    """

    sums: PlanSums
    rest: LeastSums
    limit: int

    @property
    def can_be_met(self) -> bool:
        """Whether any plan keeps within the limit."""
        return self.rest.least is not None and self.rest.least <= self.limit


@dataclass(frozen=True)
class Bound:
    """A lower bound on the scores of all completions of a partial plan that keep within the limit on the weight.

    With q the factor of the score (above 0) and p that of the weight (at least 0), every such completion has

        q * its score >= q * (score so far) + p * (weight so far - limit) + rest[cuts left][next stretch]

    because its own p * (weight - limit) is at most 0.

    Attributes:
        score_factor: q.
        weight_factor: p.
        rest: the table of q * score + p * weight.
    """

    score_factor: int
    weight_factor: int
    rest: LeastSums


def best_first(
    scores: PlanSums, fits: np.ndarray, bounds: Sequence[Bound], *, count: int, weight_limit: WeightLimit | None
) -> list[tuple[int, Positions]]:
    """Return the first `count` pairs (score, plan) of the sorted list of all plans, or all there are if fewer.

    Args:
        scores: what a plan's score is the sum of.
        fits: (n + 1, n + 1, M), bool: which blocks may be used.
        bounds: the first one has to be the plain table of the scores, with the factors 1 and 0; the largest counts.
        count: how many plans.
        weight_limit: None: none.
    """
    n, cuts = len(scores.heads), len(scores.cuts)
    limit = weight_limit.limit if weight_limit is not None else 0
    common = math.prod(bound.score_factor for bound in bounds)
    scaled = [(common // bound.score_factor, bound) for bound in bounds]
    next_cuts: dict[int, list[tuple[int, int]]] = {}  # by first stretch, of those that are asked for
    score_rest = bounds[0].rest

    def lower_bound(left: int, first: int, score: int, weight: int) -> int:
        return max(
            scale * (b.score_factor * score + b.weight_factor * (weight - limit) + b.rest.rest[left][first])
            for scale, b in scaled
        )

    plans: list[tuple[int, Positions]] = []
    extended: dict[tuple[int, int], _Extended] = {}
    heap: list[tuple[int, Positions, int, int]] = [(lower_bound(cuts, 0, 0, 0), (), 0, 0)]
    while heap and len(plans) < count:
        _, plan, score, weight = heapq.heappop(heap)
        left, first = cuts - len(plan), plan[-1][0] + 1 if plan else 0
        if left == 0:
            plans.append((score, plan))
            continue
        if not extended.setdefault((left, first), _Extended(count)).admits(score, plan, weight):
            continue
        if first not in next_cuts:
            next_cuts[first] = list(zip(*(at.tolist() for at in np.nonzero(fits[first, :n])), strict=True))
        for place, head in next_cuts[first]:
            if not score_rest.possible(score_rest.rest[left - 1][place + 1]):
                continue
            new_score, new_weight = score + scores.term(cuts - left, place, head), 0
            if weight_limit is not None:
                new_weight = weight + weight_limit.sums.term(cuts - left, place, head)
                if new_weight + weight_limit.rest.rest[left - 1][place + 1] > limit:
                    continue
            bound = lower_bound(left - 1, place + 1, new_score, new_weight)
            heapq.heappush(heap, (bound, (*plan, (place, head)), new_score, new_weight))
    return plans


def lagrangian_bound(
    scores: PlanSums, score_rest: LeastSums, weight_limit: WeightLimit, fits: np.ndarray
) -> Bound | None:
    """Return the best Lagrangian bound, or None if the best plan by score keeps within the limit anyway.

    Plans are points (weight, score). The line through two of them, one heavier than the limit and one not, gives the
    factors; the table of the sum finds whether a plan lies below the line. If one does, it replaces the point on its
    side of the limit. If none does, no other factors give a better bound (Handler and Zang 1980).

    Args:
        scores: what a plan's score is the sum of.
        score_rest: the table of `scores`.
        weight_limit: a limit that some plan meets.
        fits: (n + 1, n + 1, M), bool: which blocks may be used.
    """

    def point(plan: Positions) -> tuple[int, int]:
        return scores.total(plan), weight_limit.sums.total(plan)

    over, under = point(score_rest.best_plan()), point(weight_limit.rest.best_plan())
    if over[1] <= weight_limit.limit:
        return None
    while True:
        p, q = under[0] - over[0], over[1] - under[1]
        divisor = math.gcd(p, q)
        p, q = p // divisor, q // divisor
        rest = LeastSums(scores.combined(q, weight_limit.sums, p), fits)
        if rest.least == q * over[0] + p * over[1]:
            return Bound(score_factor=q, weight_factor=p, rest=rest)
        below = point(rest.best_plan())
        if below[1] > weight_limit.limit:
            over = below
        else:
            under = below


class _Extended:
    """The partial plans that were extended in one state, for the test of dominance."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._plans: list[tuple[int, Positions, int]] = []  # (score, plan, weight), sorted

    def admits(self, score: int, plan: Positions, weight: int) -> bool:
        """Add a partial plan and return True, unless `count` others come before it and weigh no more."""
        index = bisect.bisect_left(self._plans, (score, plan, weight))
        dominating = 0
        for k in range(index):
            dominating += self._plans[k][2] <= weight
            if dominating == self._count:
                return False
        self._plans.insert(index, (score, plan, weight))
        return True
