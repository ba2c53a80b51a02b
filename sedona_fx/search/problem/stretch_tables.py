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


def run_bytes(saved: Sequence[Mapping[int, int]], frozen: Sequence[tuple[int, int, int, int]] = ()) -> np.ndarray:
    """Return ``table[a, b]``, the bytes of the storages that the stretches a to b save for backward; 0 where b < a.

    A run that begins with stretch a counts a storage in the first of its stretches that saves it.

    Args:
        saved: for each stretch, storage -> bytes. A storage that several stretches save counts once in a run.
        frozen: what is saved by nodes that have a graph in some blocks only, as (stretch, reach, storage, bytes): in
            runs that begin with stretch `reach` or before (:func:`~sedona_fx.ir.cost.gradient_reach`).
    """
    n = len(saved)
    by_stretch: list[list[tuple[int, int, int]]] = [[] for _ in saved]
    for b, reach, storage, size in sorted(frozen):
        by_stretch[b].append((reach, storage, size))
    added = np.zeros((n + 1, n), dtype=np.int64)  # [a, b]: what a run gains by stretch b, as differences along a
    counted: dict[int, int] = {}  # storage -> the last stretch that a run may begin with so that it is counted already
    for b, stretch in enumerate(saved):
        for reach, storage, size in (*by_stretch[b], *((b, *item) for item in stretch.items())):
            if reach > (before := counted.get(storage, -1)):
                added[before + 1, b] += size
                added[reach + 1, b] -= size
                counted[storage] = reach
    return added[:-1].cumsum(axis=0).cumsum(axis=1)


def run_flops_without_graph(stretches: int, frozen: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Return ``table[a, b]``, the FLOPs that a block of the stretches a to b runs without a graph.

    Args:
        stretches: how many there are.
        frozen: (stretch, reach, FLOPs) of nodes that have a graph only in blocks that begin with stretch `reach` or
            before (:func:`~sedona_fx.ir.cost.gradient_reach`).
    """
    added = np.zeros((stretches + 1, stretches), dtype=np.int64)
    for b, reach, flops in frozen:
        added[reach + 1, b] += flops
        added[b + 1, b] -= flops
    return added[:-1].cumsum(axis=0).cumsum(axis=1)
