"""All plans of a net, listed or sampled, by the numbers of their places and heads."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from sedona_fx.search.problem.problem import Positions


def every_plan(heads: Sequence[int], cuts: int) -> Iterator[Positions]:
    """Yield all plans with a given number of cuts, ordered by their places and then by their heads.

    Args:
        heads: number of heads of each place.
        cuts: K - 1.
    """
    for places in itertools.combinations(range(len(heads)), cuts):
        for choice in itertools.product(*(range(heads[place]) for place in places)):
            yield tuple(zip(places, choice, strict=True))


def sample_plans(
    heads: Sequence[int], cuts: int, count: int, generator: random.Random, *, every: bool = True
) -> list[Positions]:
    """Return all plans with a given number of cuts if there are at most `count`, else `count` random ones.

    Args:
        heads: number of heads of each place.
        cuts: K - 1.
        count: most plans to return.
        generator: draws the places uniformly, then a head for each. The same plan may be drawn twice.
        every: False: draw `count` plans, however few there are.
    """
    if every and math.comb(len(heads), cuts) <= count:
        plans = list(itertools.islice(every_plan(heads, cuts), count + 1))
        if len(plans) <= count:
            return plans
    return [
        tuple((place, generator.randrange(heads[place])) for place in sorted(generator.sample(range(len(heads)), cuts)))
        for _ in range(count)
    ]
