"""What the guided search counts: operators take time however small their batch is, halving makes plans cheap."""

from __future__ import annotations

import math
from typing import Any

import pytest
from small_conv import chain, loader, problem_of
from torch.utils.flop_counter import FlopCounterMode

from sedona_fx.search import Guided, Problem
from sedona_fx.search.trials import effort as costs
from sedona_fx.search.trials.effort import Effort, overhead
from sedona_fx.search.trials.successive_halving import affordable
from sedona_fx.search.trials.supernet import Supernet


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(chain(4), 3)


def with_overhead(monkeypatch: pytest.MonkeyPatch, problem: Problem, wanted: float) -> None:
    """Let operators take `wanted` times what the batch makes."""
    now = overhead(problem) / costs._FLOPS_PER_OPERATOR["cpu"]
    monkeypatch.setitem(costs._FLOPS_PER_OPERATOR, "cpu", wanted / now)


def test_the_overhead_is_that_of_every_operator_against_the_nets_flops(problem: Problem) -> None:
    assert problem.data is not None
    args, _ = next(iter(problem.data.train()))
    model = chain(4)
    with FlopCounterMode(display=False) as counter:
        model(*args.args, **args.kwargs)
    operators = len([module for module in model.modules() if not list(module.children())])
    assert overhead(problem) == pytest.approx(operators * 1.7e6 / counter.get_total_flops())


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_where_operators_take_all_the_time_a_part_costs_a_step(
    problem: Problem, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = problem.places()
    with_overhead(monkeypatch, problem, 1e-12)
    free = Effort.of(problem, places, parts)
    assert free.warmup_step == pytest.approx(Effort.of(problem, places, 1).warmup_step / parts)
    with_overhead_costs = []
    for wanted in (0.25, 1.0, 1e6):
        with_overhead(monkeypatch, problem, wanted)
        with_overhead_costs.append(Effort.of(problem, places, parts).warmup_step)
        assert with_overhead_costs[-1] == pytest.approx((free.warmup_step + wanted) / (1 + wanted))
    assert with_overhead_costs[-1] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("wanted", "size"), [(1e-9, 1), (0.16, 2), (0.24, 4), (0.6, 12), (5.0, 12)])
def test_batches_are_split_until_operators_are_half_of_a_step(
    wanted: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    train = Supernet.train

    def spy(self: Supernet, batch: Any, *args: Any) -> None:
        seen.add(len(batch[1]))
        train(self, batch, *args)

    monkeypatch.setattr(Supernet, "train", spy)
    problem = problem_of(chain(4), 3, loader(3, size=12))
    with_overhead(monkeypatch, problem, wanted)
    search = Guided(training_steps=200, states=1, finalists=0, batch_size=1 if size == 1 else 2, val_batches=1)
    search.decide(problem)
    assert max(seen) == size


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("budget", [0, 1, 5, 17, 100, 333])
@pytest.mark.parametrize("whole", [math.inf, 2.5])
def test_halving_costs_what_a_loop_over_its_plans_counts(count: int, budget: float, whole: float) -> None:
    def cost(steps: int) -> float:
        total, left = 0.0, count
        for step in range(1, steps + 1):
            total += min(whole, left * 1.25)
            if step in (math.ceil(steps / 4), math.ceil(steps / 2)) and step < steps:
                left = math.ceil(left / 2)
        return total

    steps, spent = affordable(budget, count, 1.25, whole)
    assert spent == pytest.approx(cost(steps))
    assert spent <= budget
    assert cost(steps + 1) > budget
