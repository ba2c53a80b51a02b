"""The exact search over all plans of a net: the best ones by additive scores, within limits.

**Plans.** Places 0 to n - 1, in the order of the forward pass, divide a net into stretches 0 to n. A plan of K blocks
is K - 1 pairs (place, head), places ascending. A block is a run of stretches a to b: it ends at place b and has one of
that place's heads, or, as the last block, it ends at the net's output (b = n) and has none. ``fits[a, b, m]`` says
whether the block of stretches a to b with head m may be used. The score of a plan is the sum of the scores of its
pairs, and lower is better. Its weight, the FLOPs of its heads, is such a sum too and may be limited. Sums will do:
plans' trained accuracies are nearly additive in their (cut, head) pairs (docs/search.md has the measurement).

**Recurrence.** A state is (number of cuts left, first stretch of the next block), and the least score of the rest is

    rest[0][a]    = 0 if fits[a, n, 0], else impossible
    rest[left][a] = min over b, m with fits[a, b, m] of  score[b][m] + rest[left - 1][b + 1]

so that ``rest[K - 1][0]`` is the score of the best plan (:mod:`sedona_fx.search.problem.least_sums`). With M heads a
place, the table takes O(n^2 (M + K)) additions and comparisons.

**The best plans in order.** One table gives one plan. For more of them, or with a limit on the weight, partial plans
are extended cut by cut, the one with the least bound first (:mod:`sedona_fx.search.problem.best_first`). The bound is
the score so far plus the table's entry. Without a limit it is what the best completion has, so that only beginnings of
the plans returned are extended: `count` plans take O(count K n M) extensions. With a limit this is the constrained
shortest path problem, NP-hard in general; a bound that counts the weight too, and the rule that a dominated partial
plan is dropped, keep it fast: 100 places with 4 heads and 8 blocks take about a tenth of a second.

**Whole numbers.** Sums of floats depend on the order of the additions, so plans with equal scores on paper would be
ordered by rounding errors, and bounds that should be equal would not be. All scores are therefore multiplied by the
common denominator of their exact values, and added as Python integers. The result is, plan for plan, the beginning of
the sorted list of all plans, ties in the order of the plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sedona_fx.search.problem.best_first import Bound, WeightLimit, best_first, lagrangian_bound
from sedona_fx.search.problem.least_sums import LeastSums, PlanSums
from sedona_fx.search.problem.problem import Positions


@dataclass(frozen=True)
class RankedPlan:
    """A plan and its score; lower is better."""

    plan: Positions
    score: float


def best_plans(
    scores: Sequence[Sequence[float]],
    blocks: int,
    *,
    count: int = 10,
    fits: np.ndarray | None = None,
    cut_scores: Sequence[Sequence[float]] | None = None,
    weights: Sequence[Sequence[int]] | None = None,
    limit: float | None = None,
) -> list[RankedPlan]:
    """Return the `count` best plans, exactly, or all plans if there are fewer; ties go to the lexicographically first.

    Args:
        scores: ``scores[place][head]``, finite, lower is better. Places may offer different numbers of heads.
        blocks: K, at least 1.
        count: how many plans.
        fits: ``fits[a, b, m]``, bool, (n + 1, n + 1, M), M the most heads of a place: whether a block may begin after
            place a - 1 (a = 0: at the net's input) and end at place b with head m (b = n: at the net's output, with
            m = 0). None: every block may.
        cut_scores: ``cut_scores[j][place]``, finite, K - 1 rows: added to the score if the j-th cut is at the place.
            None: nothing is.
        weights: ``weights[place][head]``, whole numbers, at least 0.
        limit: on the sum of a plan's weights. None: no limit.

    Returns:
        Plans with their scores, best first. A score is rounded once, from the exact sum.

    Raises:
        ValueError: a score is not finite, or there is a limit but no weights. Both are errors in the calling code, not
            in what a user has set.
    """
    if cut_scores is None:
        cut_scores = [[0.0] * len(scores)] * (blocks - 1)
    if not all(math.isfinite(score) for row in (*scores, *cut_scores) for score in row):
        raise ValueError("scores have to be finite")
    if limit is not None and weights is None:
        raise ValueError("a limit on the weight needs weights")
    whole, scale = _whole_numbers([*scores, *cut_scores])
    sums = PlanSums(whole[: len(scores)], whole[len(scores) :])
    legal = _legal_blocks(scores, fits)
    rest = LeastSums(sums, legal)
    if rest.least is None:
        return []
    bounds, weight_limit = [Bound(score_factor=1, weight_factor=0, rest=rest)], None
    if weights is not None and limit is not None and limit != math.inf:
        weight_sums = PlanSums(weights, [[0] * len(scores)] * (blocks - 1))
        weight_limit = WeightLimit(weight_sums, LeastSums(weight_sums, legal), math.floor(limit))
        if not weight_limit.can_be_met:
            return []
        if (bound := lagrangian_bound(sums, rest, weight_limit, legal)) is not None:
            bounds.append(bound)
    ranked = best_first(sums, legal, bounds, count=count, weight_limit=weight_limit)
    return [RankedPlan(plan, float(Fraction(score, scale))) for score, plan in ranked]


def smallest_largest(costs: np.ndarray, fits: np.ndarray, blocks: int) -> tuple[float, Positions] | None:
    """Return the least cost that the largest block of a plan can have, and the first plan that has it.

    The recurrence is that of the module with the larger of two costs in place of their sum.

    Args:
        costs: ``costs[a, b, m]``, the cost of a block, with the indices of `fits`.
        fits: (n + 1, n + 1, M), bool: which blocks may be used, as in :func:`best_plans`.
        blocks: K.

    Returns:
        The cost and the plan, or None if there is no plan.
    """
    n = costs.shape[0] - 1
    allowed = np.where(fits, costs.astype(float), np.inf)
    block = allowed[:, :n].min(axis=2, initial=np.inf)  # by first stretch and place, with the cheapest head
    rest = [allowed[:, n, 0]]
    for _ in range(blocks - 1):
        by_place = np.maximum(block, rest[-1][None, 1:])
        rest.append(by_place.min(axis=1, initial=np.inf))
    least = rest[-1][0]
    if least == np.inf:
        return None
    plan, first = [], 0
    for left in range(blocks - 1, 0, -1):
        place = int(np.flatnonzero(np.maximum(block[first], rest[left - 1][1:]) <= least)[0])
        plan.append((place, int(np.flatnonzero(allowed[first, place] <= least)[0])))
        first = place + 1
    return float(least), tuple(plan)


def _whole_numbers(scores: Sequence[Sequence[float]]) -> tuple[list[list[int]], int]:
    """Return scores times their common denominator, exactly, and the denominator."""
    exact = [[Fraction(score) for score in row] for row in scores]
    scale = math.lcm(*(score.denominator for row in exact for score in row))
    return [[score.numerator * (scale // score.denominator) for score in row] for row in exact], scale


def _legal_blocks(scores: Sequence[Sequence[float]], fits: np.ndarray | None) -> np.ndarray:
    """Return which blocks may be used: those of `fits` with at least one stretch and a head that the place offers."""
    n, most = len(scores), max((len(row) for row in scores), default=1)
    offered = np.zeros((n + 1, max(1, most)), dtype=bool)
    for place, row in enumerate(scores):
        offered[place, : len(row)] = True
    offered[n, 0] = True
    nonempty = np.triu(np.ones((n + 1, n + 1), dtype=bool))
    legal = nonempty[:, :, None] & offered[None]
    return legal if fits is None else legal & fits[:, :, : legal.shape[2]]
