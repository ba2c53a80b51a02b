"""Balanced cuts: exact, against all choices there are."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sedona_fx
from sedona_fx.search import Balanced, balance


def largest(costs, shared, heads, chosen):
    """Return the largest cost of a run, straight from the definition."""
    edges = [-1, *chosen, len(costs) - 1]
    runs = [range(a + 1, b + 1) for a, b in itertools.pairwise(edges)]
    return max(
        sum(costs[k] for k in run)
        - sum(shared[k] for k in run[:-1])
        + (heads[run[-1]] if run[-1] < len(costs) - 1 else 0)
        for run in runs
    )


@st.composite
def problems(draw):
    n = draw(st.integers(0, 8))
    costs = draw(st.lists(st.integers(0, 50), min_size=n + 1, max_size=n + 1))
    shared = [draw(st.integers(0, min(a, b))) for a, b in itertools.pairwise(costs)]
    heads = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    return costs, shared, heads, draw(st.integers(1, n + 1))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_no_choice_of_cuts_is_better(problem):
    costs, shared, heads, blocks = problem
    chosen, value = balance(costs, shared, heads, blocks)
    assert len(chosen) == blocks - 1
    assert chosen == sorted(set(chosen))
    assert largest(costs, shared, heads, chosen) == value
    assert value == min(
        largest(costs, shared, heads, choice) for choice in itertools.combinations(range(len(costs) - 1), blocks - 1)
    )


def test_by_hand():
    assert balance([5, 5, 5, 5], [0, 0, 0], [0, 0, 0], 2) == ([1], 10)
    assert balance([5, 5, 5, 5], [0, 0, 0], [9, 9, 0], 2) == ([0], 15)
    assert balance([5, 5, 5, 5], [0, 0, 0], [9, 9, 9], 2) == ([0], 15)
    assert balance([5, 5, 5, 5], [0, 4, 4], [0, 0, 0], 2) == ([0], 7)
    assert balance([1, 2, 3], [0, 0], [0, 0], 1) == ([], 6)
    assert balance([7], [], [], 1) == ([], 7)


def test_it_balances_what_it_is_asked_to():
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3)]
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(*layers)
    for by in ("flops", "activation_bytes"):
        net = sedona_fx.decouple(model, (x, y), blocks=2, search=Balanced(by=by), heads="linear")
        cost = max(getattr(c, by) for c in net.costs)
        assert net.plan.provenance["largest_block"] == cost
        for cut in net.plan.base_layers:
            other = sedona_fx.decouple(model, (x, y), cuts=[cut], heads="linear")
            assert cost <= max(getattr(c, by) for c in other.costs)


def test_a_measure_that_does_not_exist():
    with pytest.raises(ValueError, match="either 'flops' or 'activation_bytes'"):
        Balanced(by="seconds")
