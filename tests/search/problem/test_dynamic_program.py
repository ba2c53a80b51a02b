"""The dynamic program over cuts and heads: the same plans, in the same order, as going through all there are."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedona_fx.search.problem.dynamic_program import best_plans, smallest_largest


def blocks_of(plan, places):
    """Return (first stretch, last stretch, head) of every block."""
    starts = [0, *(place + 1 for place, _ in plan)]
    return [(a, b, m) for a, (b, m) in zip(starts, [*plan, (places, 0)], strict=True)]


def every_plan(scores, blocks, fits):
    for cuts in itertools.combinations(range(len(scores)), blocks - 1):
        for heads in itertools.product(*(range(len(scores[k])) for k in cuts)):
            plan = tuple(zip(cuts, heads, strict=True))
            if all(fits[at] for at in blocks_of(plan, len(scores))):
                yield plan


def exact(table, plan, cut_scores):
    heads = sum((Fraction(table[k][m]) for k, m in plan), Fraction())
    return heads + sum((Fraction(cut_scores[j][k]) for j, (k, _) in enumerate(plan)), Fraction())


@st.composite
def problems(draw):
    n = draw(st.integers(0, 6))
    kinds = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    blocks = draw(st.integers(1, min(5, n + 1)))
    score = st.sampled_from([0.0, 0.1, 0.2, 0.3, -1.5, 1e-9]) | st.floats(-5, 5) | st.integers(0, 2)
    scores = [draw(st.lists(score, min_size=k, max_size=k)) for k in kinds]
    weights = [draw(st.lists(st.integers(0, 9), min_size=k, max_size=k)) for k in kinds]
    cut_scores = [draw(st.lists(score, min_size=n, max_size=n)) for _ in range(blocks - 1)]
    share = draw(st.sampled_from([0.5, 0.8, 1.0]))
    rows = np.random.default_rng(draw(st.integers(0, 10**6)))
    fits = rows.random((n + 1, n + 1, max(kinds, default=1))) < share
    limit = draw(st.none() | st.integers(0, 9 * blocks) | st.floats(0, 20))
    return scores, weights, cut_scores, blocks, fits, limit, draw(st.integers(1, 12))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_it_is_the_beginning_of_the_sorted_list_of_all_plans(problem):
    scores, weights, cut_scores, blocks, fits, limit, count = problem
    none = [[0] * len(scores)] * (blocks - 1)
    allowed = [
        plan
        for plan in every_plan(scores, blocks, fits)
        if limit is None or exact(weights, plan, none) <= Fraction(limit)
    ]
    expected = sorted((exact(scores, plan, cut_scores), plan) for plan in allowed)[:count]
    found = best_plans(scores, blocks, count=count, fits=fits, cut_scores=cut_scores, weights=weights, limit=limit)
    assert [r.plan for r in found] == [plan for _, plan in expected]
    assert [r.score for r in found] == [float(score) for score, _ in expected]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(), st.integers(0, 10**6))
def test_the_smallest_largest_block(problem, seed):
    scores, _, _, blocks, fits, _, _ = problem
    costs = np.random.default_rng(seed).integers(0, 20, fits.shape)
    offered = np.zeros_like(fits)
    for k, row in enumerate(scores):
        offered[: k + 1, k, : len(row)] = True
    offered[:, -1, 0] = True
    largest = {plan: max(costs[at] for at in blocks_of(plan, len(scores))) for plan in every_plan(scores, blocks, fits)}
    found = smallest_largest(costs, fits & offered, blocks)
    if not largest:
        assert found is None
    else:
        assert found is not None
        assert found[0] == largest[found[1]] == min(largest.values())


def test_by_hand():
    scores = [[3, 1], [1, 2], [2, 0]]
    assert [(r.plan, r.score) for r in best_plans(scores, 2, count=3)] == [
        (((2, 1),), 0),
        (((0, 1),), 1),
        (((1, 0),), 1),
    ]
    weights = [[0, 5], [1, 0], [1, 5]]
    assert best_plans(scores, 3, count=1, weights=weights, limit=5)[0].plan == ((1, 1), (2, 1))
    assert best_plans(scores, 3, count=1, weights=weights, limit=4)[0].plan == ((1, 0), (2, 0))
    assert best_plans(scores, 3, weights=weights, limit=-1) == []
    assert best_plans(scores, 5) == []
    assert [(r.plan, r.score) for r in best_plans([], 1)] == [((), 0.0)]


def test_sums_do_not_round_and_ties_go_to_the_first():
    found = best_plans([[0.1], [0.2], [0.3], [0.0]], 3, count=10)
    assert [r.plan for r in found[:2]] == [((0, 0), (3, 0)), ((1, 0), (3, 0))]
    flat = best_plans([[0.0] * 4] * 100, 8, count=3)
    assert flat[0].plan == tuple((k, 0) for k in range(7))
    assert flat[2].plan == (*((k, 0) for k in range(6)), (6, 2))


def test_scores_that_are_no_numbers():
    with pytest.raises(ValueError, match="finite"):
        best_plans([[float("nan")], [0.0]], 2)
    with pytest.raises(ValueError, match="needs weights"):
        best_plans([[1.0], [0.0]], 2, limit=3)


@pytest.mark.parametrize("limit", [None, 500_000, 2_000_000])
def test_a_hundred_places_take_about_a_second(limit):
    draw = np.random.default_rng(0)
    scores, weights = draw.normal(size=(100, 4)).tolist(), draw.integers(1, 10**6, (100, 4)).tolist()
    start = time.process_time()
    assert len(best_plans(scores, 8, weights=weights, limit=limit)) == 10
    assert time.process_time() - start < 5  # a tenth of a second or so on a quiet machine
