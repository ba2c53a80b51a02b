"""Successive halving: trained, dropped and judged as a loop of plain PyTorch over all plans does; saved anywhere."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from small_conv import chain, every_plan, loader, named, problem_of, stages_of
from torch import nn
from torch.nn.functional import cross_entropy

from sedona_fx.errors import SearchDivergedError
from sedona_fx.search import Problem
from sedona_fx.search.problem.problem import Choice
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.successive_halving import Halving, stops_of
from sedona_fx.search.trials.supernet import Supernet

DESCENT = Descent(lr=0.1, momentum=0.9, weight_decay=1e-3)
CPU = torch.device("cpu")
VALIDATION = loader(3, seed=5)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(chain(4), 2)


def plans_of(problem: Problem, cuts: int = 1) -> list[Choice]:
    places = problem.places()
    return [tuple((places[p], k) for p, k in plan) for plan in every_plan([2] * len(places), cuts)]


def stream() -> Stream:
    data = loader(4, seed=3)
    return Stream(lambda: iter([named(batch) for batch in data]), "training", 0)


def validation() -> Any:
    return [named(batch) for batch in VALIDATION]


def halving_of(problem: Problem, steps: int, plans: list[Choice] | None = None) -> Halving:
    return Halving(problem, plans or plans_of(problem), DESCENT, CPU, steps)


def run_by_hand(problem: Problem, heads: dict[Any, nn.Module], steps: int) -> tuple[list[Any], Choice]:
    """Train each plan as two separate modules, drop the worse half after a quarter and a half, take the least loss."""
    places, data = problem.places(), loader(4, seed=3)
    nets, optimizers = {}, {}
    for plan in plans_of(problem):
        ((place, kind),) = plan
        stages = stages_of(chain(4))
        end = places.index(place) + 1
        front, back = nn.Sequential(*stages[:end]), nn.Sequential(*stages[end:])
        head = copy.deepcopy(heads[place, kind])
        nets[plan] = front, head, back
        optimizers[plan] = [
            torch.optim.SGD([*front.parameters(), *head.parameters()], 0.1, momentum=0.9, weight_decay=1e-3),
            torch.optim.SGD(back.parameters(), 0.1, momentum=0.9, weight_decay=1e-3),
        ]
    left, rounds, step = list(nets), [], 0
    for end, keep in zip((math.ceil(steps / 4), math.ceil(steps / 2), steps), (2, 2, 1), strict=True):
        begin = step
        while step < end:
            x, y = data[step % 4]
            rate = 0.05 * (1 + math.cos(math.pi * (step - begin) / (end - begin)))
            for plan in left:
                front, head, back = nets[plan]
                first, second = optimizers[plan]
                first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = rate
                first.zero_grad()
                second.zero_grad()
                h = front(x)
                cross_entropy(head(h), y).backward()
                cross_entropy(back(h.detach()), y).backward()
                first.step()
                second.step()
            step += 1
        losses = {}
        for plan in left:
            front, _, back = (module.eval() for module in nets[plan])
            with torch.no_grad():
                losses[plan] = sum(cross_entropy(back(front(x)), y).item() for x, y in VALIDATION) / len(VALIDATION)
            for module in nets[plan]:
                module.train()
        ranked = sorted(left, key=lambda plan: losses[plan])
        rounds.append([(plan, losses[plan]) for plan in ranked])
        left = ranked[: math.ceil(len(ranked) / keep)]
    return rounds, left[0]


def test_rounds_and_winner_are_those_of_a_plain_loop(problem: Problem) -> None:
    halving = halving_of(problem, 9)
    heads = {n.choice[-1]: copy.deepcopy(n.head) for n in halving.tree.nodes() if n.head is not None}
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    ranked = halving.run(stream(), validation, count)
    expected, winner = run_by_hand(problem, heads, 9)
    assert calls == halving.step == 9
    assert stops_of(9) == [found["step"] for found in halving.rounds] == [3, 5, 9]
    assert [len(found["scores"]) for found in halving.rounds] == [6, 3, 2]
    names = {(place, k): [place, name] for place in problem.places() for k, name in enumerate(["linear", "sedona-1"])}
    for found, by_hand in zip(halving.rounds, expected, strict=True):
        assert [plan for plan, _ in found["scores"]] == [[names[pair] for pair in plan] for plan, _ in by_hand]
        assert [loss for _, loss in found["scores"]] == pytest.approx([loss for _, loss in by_hand], rel=1e-9)
    assert ranked[0] == winner
    assert [len(ranked), sorted(ranked)] == [2, sorted(halving.tree.plans())]


def test_the_rate_falls_to_nothing_in_each_round(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    halving = halving_of(problem, 40, plans_of(problem)[:4])
    original = halving.tree.train

    def spy(*args: Any) -> None:
        now = {group["lr"] for n in halving.tree.nodes() if n.optimizer for group in n.optimizer.param_groups}
        assert len(now) == 1
        rates.extend(now)
        original(*args)

    monkeypatch.setattr(halving.tree, "train", spy)
    halving.run(stream(), validation, lambda: None)
    for begin, end in ((0, 10), (10, 20), (20, 40)):
        own = rates[begin:end]
        assert own[0] == pytest.approx(0.1)
        assert own == sorted(own, reverse=True)
        assert own[-1] < 0.1 * 0.03


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_have_fewer_rounds(problem: Problem, steps: int) -> None:
    halving = halving_of(problem, steps)
    halving.run(stream(), validation, lambda: None)
    assert [found["step"] for found in halving.rounds] == sorted({math.ceil(steps * s) for s in (0.25, 0.5, 1)})


@pytest.mark.parametrize("failing", [False, True], ids=["all well", "a plan that fails"])
def test_saved_after_any_step_it_ends_the_same_bit_for_bit(failing: bool) -> None:
    problem = problem_of(chain(4, drop=0.3), 3)

    def fresh() -> Halving:
        halving = halving_of(problem, 7, plans_of(problem, 2)[::2])
        if failing:
            bad = next(n for n in halving.tree.nodes() if n.depth == 1 and not n.last)
            with torch.no_grad():
                next(bad.modules().parameters()).fill_(math.nan)
        return halving

    whole, data, states = fresh(), stream(), []

    def save() -> None:
        states.append((copy.deepcopy(whole.state_dict()), data.position))

    ranked = whole.run(data, validation, save)
    assert any(n.failed for n in whole.tree.nodes()) or not failing or len(ranked) < 6
    assert any(math.isinf(loss) for _, loss in whole.rounds[0]["scores"]) == failing
    for state, position in states:
        again, data_again = fresh() if failing else halving_of(problem, 7, plans_of(problem, 2)[::2]), stream()
        again.load_state_dict(state)
        data_again.go_to(position)
        assert again.run(data_again, validation, lambda: None) == ranked
        assert (again.rounds, again.spent, again.step) == (whole.rounds, whole.spent, whole.step)
        for mine, his in zip(again.tree.nodes(), whole.tree.nodes(), strict=True):
            assert mine.failed == his.failed
            for name, value in mine.modules().state_dict().items():
                assert torch.equal(value, his.modules().state_dict()[name])


def test_plans_begin_from_the_weights_they_are_given(problem: Problem) -> None:
    net = Supernet(problem, problem.places(), CPU)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    halving = halving_of(problem, 2)
    halving.begin(net.start())
    for place, kind in ((place, kind) for place in range(len(net.places)) for kind in range(2)):
        choice = (net.places[place], kind)
        node = next(n for n in halving.tree.nodes() if n.choice == (choice,) and not n.last)
        for mine, theirs in zip(node.head.parameters(), net.heads[place][kind].parameters(), strict=True):  # type: ignore[union-attr]
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
    weights = net.start().net
    for node in halving.tree.nodes():
        for module in (node.train.module, node.evaluation.module):
            for name, value in module.state_dict().items():
                assert torch.equal(value, weights[name])


def test_when_all_fail_it_says_so(problem: Problem) -> None:
    halving = halving_of(problem, 4)
    with torch.no_grad():
        for node in halving.tree.nodes():
            for p in node.modules().parameters():
                p.fill_(math.nan)
    with pytest.raises(SearchDivergedError, match="every plan, at step 1"):
        halving.run(stream(), validation, lambda: None)
