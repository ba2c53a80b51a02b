"""The exact dynamic programme over cuts and heads: the best plans for additive scores, within limits.

A plan of K blocks over n places is K - 1 (place, head) pairs, places ascending. Its score is the sum of theirs, to be
minimised; so is what it weighs (the FLOPs of its heads), which may be limited. Whether a block is allowed is a
predicate of where it begins, where it ends, and its head.

Without a limit on the weight the shortest-path table of the programme orders all plans. With one, this is the
constrained shortest path problem: the tables for score, for weight and for the best Lagrangian mixture of both (Handler
and Zang 1980) are exact lower bounds for what is still to come, and partial plans are expanded best bound first, so
that whole plans come out in order. A partial plan is dropped when as many others as plans are wanted end at the same
place, weigh no more and come before it: none of its completions can be among those wanted.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sedona_fx.search.problem.problem import Positions


@dataclass(frozen=True)
class Ranked:
    """A plan and its score, the least being best."""

    plan: Positions
    score: float


def every_plan(heads: Sequence[int], cuts: int) -> Iterator[Positions]:
    """Yield all plans of some cuts, the lexicographically first places first, then heads.

    Args:
        heads: number of heads of every place.
        cuts: K - 1.
    """
    for places in itertools.combinations(range(len(heads)), cuts):
        for picked in itertools.product(*(range(heads[place]) for place in places)):
            yield tuple(zip(places, picked, strict=True))


def best_plans(
    scores: Sequence[Sequence[float]],
    blocks: int,
    *,
    count: int = 10,
    fits: np.ndarray | None = None,
    ranks: Sequence[Sequence[float]] | None = None,
    weights: Sequence[Sequence[int]] | None = None,
    limit: float | None = None,
) -> list[Ranked]:
    """Return the `count` best plans, or all there are if fewer, exactly; ties go to the lexicographically first.

    Scores are added without rounding, so that what ties on paper ties here.

    Args:
        scores: ``scores[place][head]``, finite, lower is better. Places may offer different numbers of heads.
        blocks: K, at least 1.
        count: how many plans.
        fits: ``fits[a, b, m]``, bool, (n + 1, n + 1, most heads of a place): whether a block may begin behind place
            a - 1 (0: at the net's input) and end behind place b (n: at its output, with m = 0) with head m. None: all
            may.
        ranks: ``ranks[j][place]``, finite: added to the score where the place is that of the j-th cut. None: nothing.
        weights: ``weights[place][head]``, whole numbers, at least 0.
        limit: on the sum of a plan's weights. None: no limit.

    Returns:
        Plans with their scores (rounded once, from exact sums), best first.

    Raises:
        ValueError: a score is not finite.
    """
    orders = [[0.0] * len(scores) for _ in range(blocks - 1)] if ranks is None else ranks
    if not all(math.isfinite(s) for row in (*scores, *orders) for s in row):
        raise ValueError("scores have to be finite")
    if limit is not None and weights is None:
        raise ValueError("a limit on the weight needs weights")
    whole, scale = _whole([*scores, *orders])
    sums = _Sums(whole[: len(scores)], whole[len(scores) :])
    kept = _legal(scores, fits)
    score = _Table(sums, kept)
    if score.start is None:
        return []
    if limit is None or limit == math.inf:
        found = _expand(sums, sums, kept, count, None, [(1, 0, score)])
    else:
        assert weights is not None
        heavy = _Sums(weights, [[0] * len(scores)] * (blocks - 1))
        weight, most = _Table(heavy, kept), math.floor(limit)
        if weight.start is None or weight.start > most:
            return []
        bounds = [(1, 0, score), *_mixture(sums, heavy, kept, most, score, weight)]
        found = _expand(sums, heavy, kept, count, (most, weight), bounds)
    return [Ranked(plan, float(Fraction(value, scale))) for value, plan in found]


def smallest_largest(costs: np.ndarray, fits: np.ndarray, blocks: int) -> tuple[float, Positions] | None:
    """Return the least possible cost of a plan's largest block, and the first plan that has it; None if there is none.

    Args:
        costs: ``costs[a, b, m]`` of a block, indices as those of `fits` in :func:`best_plans`.
        fits: blocks that may be.
        blocks: K.
    """
    n = costs.shape[0] - 1
    allowed = np.where(fits, costs.astype(float), np.inf)
    step, rest = allowed[:, :n].min(axis=2, initial=np.inf), [allowed[:, n, 0]]
    for _ in range(blocks - 1):
        ahead = np.maximum(step, rest[-1][None, 1:])
        rest.append(ahead.min(axis=1, initial=np.inf))
    least = rest[-1][0]
    if least == np.inf:
        return None
    plan, at = [], 0
    for left in range(blocks - 1, 0, -1):
        b = int(np.flatnonzero(np.maximum(step[at], rest[left - 1][1:]) <= least)[0])
        plan.append((b, int(np.flatnonzero(allowed[at, b] <= least)[0])))
        at = b + 1
    return float(least), tuple(plan)


@dataclass(frozen=True)
class _Sums:
    """Whole numbers that are added up along a plan: of every (place, head), and of every (rank, place)."""

    heads: Sequence[Sequence[int]]
    ranks: Sequence[Sequence[int]]

    def of(self, rank: int, place: int, head: int) -> int:
        return self.heads[place][head] + self.ranks[rank][place]

    def total(self, plan: Positions) -> int:
        return sum(self.of(rank, place, head) for rank, (place, head) in enumerate(plan))

    def mixed(self, q: int, p: int, other: _Sums) -> _Sums:
        """Return q times this and p times the other."""

        def mix(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> list[list[int]]:
            return [[q * x + p * y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]

        return _Sums(mix(self.heads, other.heads), mix(self.ranks, other.ranks))


class _Table:
    """The least sum of costs from every state to the end: ``rest[cuts left][stretch that comes next]``.

    Sums are of Python's whole numbers, which do not round and do not overflow; `far` stands for "not possible".
    """

    def __init__(self, sums: _Sums, fits: np.ndarray) -> None:
        n, cuts = len(sums.heads), len(sums.ranks)
        largest = sum(max((abs(c) for row in rows for c in row), default=0) for rows in (sums.heads, sums.ranks))
        self.far = 4 * (cuts + 2) * (2 * largest + 1)
        padded = np.full((n, fits.shape[2]), self.far, dtype=object)
        for place, row in enumerate(sums.heads):
            padded[place, : len(row)] = row
        far = np.array(self.far, dtype=object)
        self._steps = np.where(fits[:, :n], padded[None], far)
        self._step = self._steps.min(axis=2) if n else np.empty((1, 0), dtype=object)
        rest = [np.where(fits[:, n, 0], np.array(0, dtype=object), far)]
        self._ranks = [np.array(row, dtype=object) for row in sums.ranks]
        for rank in reversed(range(cuts)):
            ahead = self._step + (self._ranks[rank] + rest[-1][1:])[None]
            rest.append(ahead.min(axis=1, initial=self.far))
        self.rest: list[list[int]] = [row.tolist() for row in rest]

    @property
    def start(self) -> int | None:
        """The least sum of a whole plan, or None if there is no plan."""
        return least if self.possible(least := self.rest[-1][0]) else None

    def possible(self, value: int) -> bool:
        return value < self.far // 2

    def plan(self) -> Positions:
        """Return a plan with the least sum."""
        found, at = [], 0
        for rank, order in enumerate(self._ranks):
            rest = self.rest[len(self._ranks) - 1 - rank]
            b = int((self._step[at] + order + np.array(rest[1:], dtype=object)).argmin())
            found.append((b, int(self._steps[at, b].argmin())))
            at = b + 1
        return tuple(found)


def _whole(scores: Sequence[Sequence[float]]) -> tuple[list[list[int]], int]:
    """Return scores times a common scale as whole numbers, exactly, and the scale."""
    exact = [[Fraction(s) for s in row] for row in scores]
    scale = math.lcm(*(f.denominator for row in exact for f in row))
    return [[f.numerator * (scale // f.denominator) for f in row] for row in exact], scale


def _legal(scores: Sequence[Sequence[float]], fits: np.ndarray | None) -> np.ndarray:
    """Return the blocks that may be: allowed, at least one stretch long, with a head that is offered."""
    n, most = len(scores), max((len(row) for row in scores), default=1)
    offered = np.zeros((n + 1, max(1, most)), dtype=bool)
    for place, row in enumerate(scores):
        offered[place, : len(row)] = True
    offered[n, 0] = True
    forward = np.triu(np.ones((n + 1, n + 1), dtype=bool))
    legal = forward[:, :, None] & offered[None]
    return legal if fits is None else legal & fits[:, :, : legal.shape[2]]


def _mixture(
    scores: _Sums, weights: _Sums, fits: np.ndarray, limit: int, score: _Table, weight: _Table
) -> list[tuple[int, int, _Table]]:
    """Return (q, p, table of q score + p weight) with the best Lagrangian bound; nothing if the limit does not bind."""

    def totals(plan: Positions) -> tuple[int, int]:
        return scores.total(plan), weights.total(plan)

    over, under = totals(score.plan()), totals(weight.plan())
    if over[1] <= limit:
        return []
    while True:  # the line through both plans; a plan below it takes the place of the one on its side of the limit
        p, q = under[0] - over[0], over[1] - under[1]
        common = math.gcd(p, q)
        p, q = p // common, q // common
        table = _Table(scores.mixed(q, p, weights), fits)
        if table.start == q * over[0] + p * over[1]:
            return [(q, p, table)]
        better = totals(table.plan())
        over, under = (better, under) if better[1] > limit else (over, better)


def _expand(
    scores: _Sums,
    weights: _Sums,
    fits: np.ndarray,
    count: int,
    limited: tuple[int, _Table] | None,
    bounds: Sequence[tuple[int, int, _Table]],
) -> list[tuple[int, Positions]]:
    """Return whole plans in order of (score, plan), by expanding partial ones in order of (lower bound, plan).

    A bound (q, p, table) says that q score >= q (score so far) + p (weight so far) + rest of the table - p limit.
    Bounds never fall along a plan, and a partial plan comes before its completions in the order of tuples: so every
    plan comes out before those behind it.
    """
    n, cuts, limit = len(scores.heads), len(scores.ranks), limited[0] if limited is not None else 0
    unit = math.prod(q for q, _, _ in bounds)
    scaled = [(unit // q, q, p, table) for q, p, table in bounds]
    ends = [[(b, m) for b in range(n) for m in np.flatnonzero(fits[a, b]).tolist()] for a in range(n + 1)]

    def bound(left: int, at: int, score: int, weight: int) -> int:
        return max(f * (q * score + p * (weight - limit) + table.rest[left][at]) for f, q, p, table in scaled)

    found: list[tuple[int, Positions]] = []
    before: dict[tuple[int, int], _Front] = {}
    heap: list[tuple[int, Positions, int, int]] = [(bound(cuts, 0, 0, 0), (), 0, 0)]
    first = scaled[0][3]
    while heap and len(found) < count:
        _, plan, score, weight = heapq.heappop(heap)
        left, at = cuts - len(plan), plan[-1][0] + 1 if plan else 0
        if left == 0:
            found.append((score, plan))
            continue
        front = before.setdefault((left, at), _Front(count))
        if not front.admits(score, plan, weight if limited is not None else 0):
            continue
        for b, m in ends[at]:
            if not first.possible(first.rest[left - 1][b + 1]):
                continue
            s, w = score + scores.of(cuts - left, b, m), weight + weights.of(cuts - left, b, m)
            if limited is None or w + limited[1].rest[left - 1][b + 1] <= limit:
                heapq.heappush(heap, (bound(left - 1, b + 1, s, w), (*plan, (b, m)), s, w))
    return found


class _Front:
    """Partial plans that end at one place, and whether one more can matter."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[int, Positions, int]] = []

    def admits(self, score: int, plan: Positions, weight: int) -> bool:
        """Keep a partial plan unless `count` others come before it and weigh no more."""
        ahead = bisect.bisect_left(self._kept, (score, plan, weight))
        better = 0
        for k in range(ahead):
            better += self._kept[k][2] <= weight
            if better == self._count:
                return False
        self._kept.insert(ahead, (score, plan, weight))
        return True
