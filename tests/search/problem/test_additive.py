"""The additive model of plans' scores: exact where scores are sums, else the least squares of plain numpy."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from small_conv import Plan, every_plan

from sedona_fx.search.problem.additive import fit, sample

HEADS = [2, 1, 3, 2, 1]


def table(seed: int) -> list[list[float]]:
    draws = random.Random(seed)
    return [[draws.gauss(0, 1) for _ in range(kinds)] for kinds in HEADS]


def predicted(terms: list[list[float]], plans: list[Plan]) -> np.ndarray:
    return np.array([sum(terms[place][head] for place, head in plan) for plan in plans])


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_scores_that_are_sums_are_found_again(cuts: int) -> None:
    plans = every_plan(HEADS, cuts)
    scores = predicted(table(1), plans) + 5.0
    terms, explained = fit(plans, scores, HEADS)
    assert [len(row) for row in terms] == HEADS
    assert explained == pytest.approx(1.0, abs=1e-9)
    assert predicted(terms, plans) + scores.mean() == pytest.approx(scores, abs=1e-5)
    true = table(1)  # up to a constant that any plan has K - 1 times
    shifts = [a - b for mine, his in zip(terms, true, strict=True) for a, b in zip(mine, his, strict=True)]
    assert shifts == pytest.approx([shifts[0]] * len(shifts), abs=1e-5)


def test_other_scores_are_fitted_as_by_numpy() -> None:
    draws = np.random.default_rng(0)
    plans = every_plan(HEADS, 2)
    scores = predicted(table(2), plans) + draws.normal(size=len(plans))
    terms, explained = fit(plans, scores, HEADS)
    columns = [(place, head) for place, kinds in enumerate(HEADS) for head in range(kinds)]
    design = np.array([[1.0 if column in plan else 0.0 for column in columns] for plan in plans])
    weights, *_ = np.linalg.lstsq(design, scores - scores.mean(), rcond=None)
    assert predicted(terms, plans) == pytest.approx(design @ weights, abs=1e-5)
    left = scores - scores.mean() - design @ weights
    assert explained == pytest.approx(1 - left.var() / scores.var(), abs=1e-6)
    assert 0.1 < explained < 0.95


def test_equal_scores_and_unseen_pairs() -> None:
    plans = every_plan(HEADS, 2)
    terms, explained = fit(plans, np.full(len(plans), 3.0), HEADS)
    assert explained == 1.0
    assert np.concatenate(terms) == pytest.approx(np.zeros(sum(HEADS)))
    some = [plan for plan in plans if (2, 1) not in plan]
    terms, _ = fit(some, predicted(table(3), some), HEADS)
    assert terms[2][1] == 0.0


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_few_plans_are_all_listed(cuts: int) -> None:
    plans = every_plan(HEADS, cuts)
    assert sample(HEADS, cuts, len(plans), random.Random(0)) == plans
    assert sample(HEADS, cuts, 10_000, random.Random(0)) == plans


@pytest.mark.parametrize(("count", "every"), [(20, True), (400, False)])
def test_of_many_plans_some_are_drawn(count: int, every: bool) -> None:
    plans = sample(HEADS, 2, count, random.Random(0), every=every)
    assert len(plans) == count
    assert set(plans) <= set(every_plan(HEADS, 2))
    assert all(a < b for plan in plans for (a, _), (b, _) in itertools.pairwise(plan))
    assert plans == sample(HEADS, 2, count, random.Random(0), every=every)
    assert plans != sample(HEADS, 2, count, random.Random(1), every=every)


def test_places_are_drawn_uniformly() -> None:
    plans = sample(HEADS, 2, 5000, random.Random(0), every=False)
    for places in itertools.combinations(range(5), 2):
        share = sum(tuple(place for place, _ in plan) == places for plan in plans) / 5000
        assert abs(share - 1 / math.comb(5, 2)) < 0.02
