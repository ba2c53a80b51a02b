"""Tables of the costs of all runs: the same numbers as added up run by run, and quadratic in the stretches."""

import math
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sedona_fx.search.problem.dynamic_program import best_plans
from sedona_fx.search.problem.stretch_tables import run_bytes, run_sums

SECONDS = st.floats(0, 10) | st.floats(1e-9, 1e-3) | st.sampled_from([0.1, 0.2, 0.3, 1e-300, 5e-324, 1e300])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**55), min_size=1, max_size=9) | st.lists(SECONDS, min_size=1, max_size=9))
def test_sums_are_those_of_every_run_rounded_once(costs):
    table = run_sums(costs)
    add = sum if isinstance(costs[0], int) else math.fsum
    for a in range(len(costs)):
        for b in range(len(costs)):
            expected = add(costs[a : b + 1]) if b >= a else 0
            assert table.item(a, b) == expected
            assert isinstance(table.item(a, b), type(costs[0]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.integers(0, 6), st.integers(0, 2**50), max_size=5), min_size=1, max_size=8))
def test_bytes_count_a_storage_once_in_a_run(saved):
    table = run_bytes(saved)
    for a in range(len(saved)):
        for b in range(len(saved)):
            counted = {}
            for stretch in saved[a : b + 1]:
                counted = {**stretch, **counted}  # the first stretch of a run that saves it says how large it is
            assert table.item(a, b) == sum(counted.values())


def seconds_of(function):
    """Return the least processor time of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def test_the_tables_of_a_thousand_stretches_take_no_time():
    # The cubic ones took 1 s for whole numbers and 3.3 s for seconds.
    generator = np.random.default_rng(0)
    assert seconds_of(lambda: run_sums(generator.integers(0, 99, 1000).tolist())) < 0.5
    assert seconds_of(lambda: run_sums(generator.random(1000).tolist())) < 2.0
    assert seconds_of(lambda: run_bytes([{k: 4, k + 1: 4} for k in range(1000)])) < 0.5
    scores = [[0.0]] * 999
    assert seconds_of(lambda: best_plans(scores, 4, count=1, weights=[[1]] * 999, limit=9)) < 2.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_large_and_small_whole_numbers_give_the_same_plans(scores, data):
    """Sums that fit into 64 bits are added there, others as Python's integers: the plans are the same."""
    blocks = data.draw(st.integers(1, len(scores) + 1))
    small = best_plans(scores, blocks, count=20)
    large = best_plans([[score * 2**64 for score in row] for row in scores], blocks, count=20)
    assert [(entry.plan, entry.score * 2**64) for entry in small] == [(entry.plan, entry.score) for entry in large]
