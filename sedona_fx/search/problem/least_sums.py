"""The table of the dynamic program over plans: the least sum that the rest of a plan can have, from every state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedona_fx.search.problem.problem import Positions


@dataclass(frozen=True)
class PlanSums:
    """Whole numbers that are added up along a plan.

    Attributes:
        heads: ``heads[place][head]`` is added for a cut at a place with a head.
        cuts: ``cuts[j][place]`` is added if the j-th cut is at a place; K - 1 rows of n numbers.
    """

    heads: Sequence[Sequence[int]]
    cuts: Sequence[Sequence[int]]

    def term(self, cut: int, place: int, head: int) -> int:
        """Return what one cut adds, as the `cut`-th of a plan."""
        return self.heads[place][head] + self.cuts[cut][place]

    def total(self, plan: Positions) -> int:
        """Return the sum of a whole plan."""
        return sum(self.term(cut, place, head) for cut, (place, head) in enumerate(plan))

    def combined(self, factor: int, other: PlanSums, other_factor: int) -> PlanSums:
        """Return ``factor * self + other_factor * other``."""

        def add(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> list[list[int]]:
            return [
                [factor * x + other_factor * y for x, y in zip(*rows, strict=True)]
                for rows in zip(left, right, strict=True)
            ]

        return PlanSums(add(self.heads, other.heads), add(self.cuts, other.cuts))


class LeastSums:
    """The least sum from every state to the end of a plan.

    Numbers are whole, and neither round nor overflow: int64 where all of them fit, else Python integers in arrays of
    dtype object, which take thirty times as long. "Impossible" is a number so large that it stays above every sum of a
    plan whatever terms are added to it: additions and minima need no special case for it.

    Args:
        sums: what is added up along a plan over n places.
        fits: (n + 1, n + 1, M), bool: ``fits[a, b, m]`` says whether a block may begin with stretch a and end at place
            b with head m.

    Attributes:
        rest: ``rest[left][a]`` is the least sum of the `left` cuts that are still to be made, if the next block begins
            with stretch a.
    """

    def __init__(self, sums: PlanSums, fits: np.ndarray) -> None:
        n, cuts = len(sums.heads), len(sums.cuts)
        largest = sum(max((abs(c) for row in rows for c in row), default=0) for rows in (sums.heads, sums.cuts))
        self._impossible = 4 * (cuts + 2) * (2 * largest + 1)
        # No number in here is above twice "impossible" and a term.
        self._dtype: type = np.int64 if 4 * self._impossible < 2**63 else object
        impossible = np.array(self._impossible, dtype=self._dtype)
        head_terms = np.full((n, fits.shape[2]), self._impossible, dtype=self._dtype)
        for place, row in enumerate(sums.heads):
            head_terms[place, : len(row)] = row
        self._cut_terms = [np.array(row, dtype=self._dtype) for row in sums.cuts]
        self._block_terms = np.where(fits[:, :n], head_terms[None], impossible)  # by first stretch, place and head
        self._best_terms = self._block_terms.min(axis=2) if n else np.empty((1, 0), dtype=self._dtype)
        rest = [np.where(fits[:, n, 0], np.array(0, dtype=self._dtype), impossible)]
        for cut in reversed(range(cuts)):
            by_place = self._best_terms + (self._cut_terms[cut] + rest[-1][1:])[None]
            rest.append(by_place.min(axis=1, initial=self._impossible))
        self.rest: list[list[int]] = [row.tolist() for row in rest]

    @property
    def least(self) -> int | None:
        """The least sum of a whole plan, or None if there is no plan."""
        return least if self.possible(least := self.rest[-1][0]) else None

    def possible(self, value: int) -> bool:
        """Whether an entry of `rest` is the sum of a plan and not "impossible"."""
        return value < self._impossible // 2

    def best_plan(self) -> Positions:
        """Return a plan with the least sum; there has to be a plan."""
        plan, first = [], 0
        for cut, cut_terms in enumerate(self._cut_terms):
            rest = self.rest[len(self._cut_terms) - 1 - cut]
            place = int((self._best_terms[first] + cut_terms + np.array(rest[1:], dtype=self._dtype)).argmin())
            plan.append((place, int(self._block_terms[first, place].argmin())))
            first = place + 1
        return tuple(plan)
