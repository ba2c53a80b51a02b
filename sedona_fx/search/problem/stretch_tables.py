"""Costs of all runs of stretches, as tables over (first stretch, last stretch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def run_sums(costs: Sequence[float]) -> list[list[float]]:
    """Return ``table[a][b]``, the sum of the costs of the stretches a to b; 0 where b < a.

    Seconds are rounded once, so that a block costs the same whichever places it is put together from.
    """
    n, add = len(costs), sum if all(isinstance(cost, int) for cost in costs) else math.fsum
    return [[0.0] * a + [add(costs[a : b + 1]) for b in range(a, n)] for a in range(n)]


def run_bytes(saved: Sequence[Mapping[int, int]]) -> list[list[float]]:
    """Return ``table[a][b]``, the bytes of the storages that the stretches a to b save for backward; 0 where b < a.

    Args:
        saved: for each stretch, storage -> bytes. A storage that several stretches save counts once in a run.
    """
    table = []
    for a in range(len(saved)):
        row, counted, total = [0.0] * a, set[int](), 0
        for stretch in saved[a:]:
            total += sum(size for storage, size in stretch.items() if storage not in counted)
            counted.update(stretch)
            row.append(total)
        table.append(row)
    return table
