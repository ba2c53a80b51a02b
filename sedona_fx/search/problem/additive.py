"""An additive model of a score of plans: what each (place, head) adds, by least squares.

Plans' trained accuracies are nearly additive in their (cut, head) pairs (docs/search.md has the measurement), and sums
are what the dynamic programme over all plans can handle exactly.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from sedona_fx.search.problem.dynamic_program import every_plan
from sedona_fx.search.problem.problem import Positions

_RIDGE = 1e-6  # every plan has K - 1 pairs, so that a constant can be moved between the terms: take the smallest


def fit(plans: Sequence[Positions], scores: np.ndarray, heads: Sequence[int]) -> tuple[list[list[float]], float]:
    """Return what every (place, head) adds to a plan's score, and the share of the scores' variance this explains.

    Args:
        plans: of one length.
        scores: one a plan, finite.
        heads: number of heads of every place.
    """
    begins = np.concatenate([[0], np.cumsum(heads)]).astype(int)
    present = np.zeros((len(plans), begins[-1]))
    for row, plan in enumerate(plans):
        for place, head in plan:
            present[row, begins[place] + head] = 1.0
    mean = float(scores.mean())
    gram = present.T @ present + _RIDGE * np.eye(begins[-1])
    weights = np.linalg.solve(gram, present.T @ (scores - mean))
    left = scores - mean - present @ weights
    total = float(((scores - mean) ** 2).sum())
    explained = 1.0 if total == 0 else 1 - float((left**2).sum()) / total
    return [weights[a:b].tolist() for a, b in itertools.pairwise(begins)], explained


def sample(heads: Sequence[int], cuts: int, count: int, draws: random.Random, *, every: bool = True) -> list[Positions]:
    """Return all plans of some cuts where there are no more than `count`, else as many drawn at random.

    Args:
        heads: number of heads of every place.
        cuts: K - 1.
        count: plans at most.
        draws: places are drawn uniformly, then heads; the same plan may come twice.
        every: list all plans where they are few; else draw in any case.
    """
    if every and math.comb(len(heads), cuts) <= count:
        found = list(itertools.islice(every_plan(heads, cuts), count + 1))
        if len(found) <= count:
            return found
    return [
        tuple((place, draws.randrange(heads[place])) for place in sorted(draws.sample(range(len(heads)), cuts)))
        for _ in range(count)
    ]
