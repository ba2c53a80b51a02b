"""Proposals: all plans where they are few, else different ones by rule and by chance; all within the budget."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
from small_conv import HEADS, chain, every_plan, loader, problem_of

import sedona_fx
from sedona_fx.errors import BudgetError, CutError
from sedona_fx.search import Limits, Problem
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.trials.proposals import proposals

MODEL = chain(5)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(MODEL, 3)


def in_places(problem: Problem, cuts: int) -> list[Any]:
    places = problem.places()
    return [
        tuple((places[place], head) for place, head in plan) for plan in every_plan([len(HEADS)] * len(places), cuts)
    ]


@pytest.fixture(scope="module")
def limits(problem: Problem) -> Limits:
    """A budget that about a third of all plans keep within."""
    costs, every = plan_costs(problem), in_places(problem, 2)
    totals = sorted(sum(costs.heads["head_flops"][problem.position(p)][k] for p, k in plan) for plan in every)
    return Limits(head_flops=totals[len(every) // 3])


@pytest.fixture(scope="module")
def accepted(problem: Problem, limits: Limits) -> set[Any]:
    """The plans that ``decouple`` does not refuse, one by one."""
    found = set()
    for plan in in_places(problem, 2):
        cuts, heads = [place for place, _ in plan], [HEADS[head] for _, head in plan]
        with contextlib.suppress(CutError):
            sedona_fx.decouple(MODEL, loader()[0], cuts=cuts, heads=heads, budget=limits, progress=False)
            found.add(plan)
    assert 2 < len(found) < 20
    return found


def test_few_plans_are_all_proposed(problem: Problem) -> None:
    plans = in_places(problem, 2)
    assert len(plans) == math.comb(4, 2) * 4
    for count in (len(plans), 1000):
        assert sorted(proposals(problem, count)) == sorted(plans)


def test_of_many_plans_some_are_proposed_none_twice_by_seed(problem: Problem) -> None:
    some = proposals(problem, 15)
    assert len(some) == len(set(some)) == 15
    assert set(some) <= set(in_places(problem, 2))
    assert some == proposals(problem, 15)
    other = proposals(replace(problem, seed=8), 15)
    assert other != some
    places = problem.places()
    for kept in (some, other):  # by rule: the latest cuts, and uniform ones
        cuts = {tuple(place for place, _ in plan) for plan in kept}
        assert tuple(places[-2:]) in cuts
        assert (places[5 // 3 - 1], places[10 // 3 - 1]) in cuts
    assert len(proposals(problem, 2)) == 2


@pytest.mark.parametrize("count", [1, 5, 1000])
@pytest.mark.parametrize("listed", [10_000, 0], ids=["listed", "too many to list"])
def test_proposals_keep_within_the_budget(
    problem: Problem, limits: Limits, accepted: set[Any], count: int, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sedona_fx.search.trials.proposals._MOST_LISTED", listed)
    some = proposals(replace(problem, limits=limits), count)
    assert len(some) == len(set(some)) == min(count, len(accepted))
    assert set(some) <= accepted


def test_no_plan_within_the_budget_and_no_heads_are_errors(problem: Problem) -> None:
    with pytest.raises(BudgetError):
        proposals(replace(problem, limits=Limits(block_flops=1)), 5)
    with pytest.raises(CutError, match=r"search='rollout' compares plans .* cannot run with heads=False"):
        proposals(replace(problem, candidates={place: [] for place in problem.candidates}), 5)
