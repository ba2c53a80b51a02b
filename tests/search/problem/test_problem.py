"""The problem that a search is given: a plan and its decision say the same, and without heads nothing is searched."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from small_conv import HEADS, chain, loader, problem_of

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.search import BestOf, Decision, Guided, Latest, Problem, Rollout, Sedona


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(chain(4), 3)


def test_plans_and_decisions(problem: Problem) -> None:
    first, second, third = problem.places()
    decision = problem.decision([(first, 1), [third, 0]], {"search": "by hand"})  # as a journal gives them back
    assert decision == Decision([first, third], [HEADS[1], HEADS[0]], {"search": "by hand"})
    assert problem.choice(decision) == ((first, 1), (third, 0))
    assert problem.choice(Decision([], [])) == ()
    bare = replace(problem, candidates={place: [] for place in problem.candidates})
    assert bare.decision([(second, 0)], {}) == Decision([second], [None])
    for head, named in ((None, "no head"), ("sedona-4", "the head 'sedona-4'")):
        with pytest.raises(CutError, match=rf"puts {named} behind '{second}', where the candidates are \['linear', "):
            problem.choice(Decision([second], [head]))


QUICK: dict[str, Any] = {
    "search='guided'": Guided(training_steps=200),
    "search='sedona'": Sedona(training_steps=50),
    "search='rollout'": Rollout(steps=2),
    "BestOf": BestOf(search=Latest(), steps=1),
}


@pytest.mark.parametrize("who", [*QUICK, "pareto"])
def test_without_heads_nothing_is_searched(who: str) -> None:
    how: dict[str, Any] = {"blocks": 3, "heads": False, "progress": False}
    call = sedona_fx.pareto if who == "pareto" else functools.partial(sedona_fx.decouple, search=QUICK[who])
    with pytest.raises(CutError, match=rf"^{who} compares plans by .* cannot run with heads=False: leave that out, or"):
        call(chain(4), loader(), **how)
