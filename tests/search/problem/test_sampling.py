"""Plans, listed where there are few and drawn at random where there are many."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from small_conv import every_plan

from sedona_fx.search.problem.sampling import sample_plans

HEADS = [2, 1, 3, 2, 1]


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_few_plans_are_all_listed(cuts: int) -> None:
    plans = every_plan(HEADS, cuts)
    assert sample_plans(HEADS, cuts, len(plans), random.Random(0)) == plans
    assert sample_plans(HEADS, cuts, 10_000, random.Random(0)) == plans


@pytest.mark.parametrize(("count", "every"), [(20, True), (400, False)])
def test_of_many_plans_some_are_drawn(count: int, every: bool) -> None:
    plans = sample_plans(HEADS, 2, count, random.Random(0), every=every)
    assert len(plans) == count
    assert set(plans) <= set(every_plan(HEADS, 2))
    assert all(a < b for plan in plans for (a, _), (b, _) in itertools.pairwise(plan))
    assert plans == sample_plans(HEADS, 2, count, random.Random(0), every=every)
    assert plans != sample_plans(HEADS, 2, count, random.Random(1), every=every)


def test_places_are_drawn_uniformly() -> None:
    plans = sample_plans(HEADS, 2, 5000, random.Random(0), every=False)
    for places in itertools.combinations(range(5), 2):
        share = sum(tuple(place for place, _ in plan) == places for plan in plans) / 5000
        assert abs(share - 1 / math.comb(5, 2)) < 0.02
