"""Costs of all runs of stretches, as tables over (first stretch, last stretch), in time quadratic in the stretches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np


def run_sums(costs: Sequence[float]) -> np.ndarray:
    """Return ``table[a, b]``, the sum of the costs of the stretches a to b; 0 where b < a.

    Sums are differences of two sums from the start. Whole numbers stay whole (int64). Seconds are added as exact
    fractions and rounded once, so that a block costs the same whichever places it is put together from.

    Args:
        costs: whole numbers whose sum is below 2^63, or finite floats.
    """
    if all(isinstance(cost, int) for cost in costs):
        sums = np.concatenate([[0], np.cumsum(np.array(costs, dtype=np.int64))])
        return np.triu(sums[None, 1:] - sums[:-1, None])
    fractions = [Fraction(cost) for cost in costs]
    scale = max(fraction.denominator for fraction in fractions)  # powers of two all of them
    whole = [fraction.numerator * (scale // fraction.denominator) for fraction in fractions]
    exact = list(itertools.accumulate(whole, initial=0))
    # Python divides whole numbers of any size with one rounding.
    rows = [[0.0] * a + [(end - start) / scale for end in exact[a + 1 :]] for a, start in enumerate(exact[:-1])]
    return np.array(rows)


def run_bytes(saved: Sequence[Mapping[int, int]]) -> np.ndarray:
    """Return ``table[a, b]``, the bytes of the storages that the stretches a to b save for backward; 0 where b < a.

    A run that begins with stretch a counts a storage in the first of its stretches that saves it.

    Args:
        saved: for each stretch, storage -> bytes. A storage that several stretches save counts once in a run.
    """
    n = len(saved)
    added = np.zeros((n + 1, n), dtype=np.int64)  # [a, b]: what a run gains by stretch b, as differences along a
    last_seen: dict[int, int] = {}
    for b, stretch in enumerate(saved):
        for storage, size in stretch.items():
            added[last_seen.get(storage, -1) + 1, b] += size  # in runs that begin behind the stretch that saved it last
            added[b + 1, b] -= size
            last_seen[storage] = b
    return added[:-1].cumsum(axis=0).cumsum(axis=1)
