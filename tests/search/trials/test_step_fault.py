"""No step of a search on a loss or gradient that is not finite: weights, momentum and buffers stay, and it is said."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from small_conv import chain, every_plan, loader, named, problem_of, stages_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.errors import SearchDivergedError
from sedona_fx.search import BestOf, Guided, Rollout, Sedona, Uniform
from sedona_fx.search.problem.problem import local_loss_of
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort
from sedona_fx.search.trials.gradient_comparison import Comparison
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.step_fault import step_fault
from sedona_fx.search.trials.supernet import Supernet

CPU = torch.device("cpu")
GRADIENT = "the gradient of {!r} holds nan, although the losses are finite"


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=1e-3)


def spoilt(output: Tensor) -> Tensor:
    """Return 0, with the gradient NaN: a norm at zero."""
    return (output - output.detach()).pow(2).sum().sqrt()


class Faulty:
    """Cross-entropy that counts its calls; in some of them, and while `bad` is set, its gradient is NaN."""

    def __init__(self, bad: Callable[[int], bool] = lambda call: False) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        value = cross_entropy(output, target)
        return value + spoilt(output) if self.bad(self.calls) and output.requires_grad else value


class Spoiling(nn.Module):
    """Passes scores on; the gradient that comes back is NaN."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores + (scores - scores.detach()).pow(2).sum(1, keepdim=True).sqrt()


def spoiling(context: Any) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(context.channels, 4), Spoiling())


# ---- the check itself ------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_named() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([a, b], 0.1)
    names: list[tuple[str, nn.Parameter]] = [("a", a), ("b", b)]
    fine, bad = torch.tensor(1.0), torch.tensor(math.inf)
    assert step_fault({"x": fine, "y": fine}, optimizer, lambda: names) == ""
    assert step_fault({"x": fine, "y": fine}, None, lambda: names) == ""
    assert step_fault({"x": fine, "y": bad, "z": bad}, optimizer, lambda: names) == "the loss of y is inf"
    a.grad, b.grad = torch.tensor([1.0, 3e38]), torch.zeros(3)
    assert step_fault({"x": fine}, optimizer, lambda: names) == ""  # large, but finite
    a.grad[0] = -math.inf
    expected = "the gradient of 'a' holds -inf, although the losses are finite"
    assert step_fault({"x": fine}, optimizer, lambda: names) == expected
    b.grad[2] = math.nan
    assert step_fault({"x": fine}, optimizer, lambda: names) == GRADIENT.format("b")
    assert step_fault({"x": bad}, optimizer, lambda: names) == "the loss of x is inf"


# ---- one set of weights for all plans --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gradient", GRADIENT.format("4.2.bias")),
        ("one gradient", GRADIENT.format("1.bias of head 1 behind 2")),
        ("loss", "the loss of the block up to '0' is nan"),
        ("input", "the loss of the block up to '0' is nan"),
    ],
)
def test_a_step_of_the_supernet_that_is_left_out_leaves_nothing_behind(kind: str, said: str) -> None:
    """The steps around it are those of plain PyTorch that has never seen the bad batch, BatchNorm's averages too."""
    now, ends = False, itertools.count(1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value, block = cross_entropy(output, target), next(ends) % 3
        if not now or kind == "input":
            return value
        if kind == "loss":
            return value * math.nan
        return value + spoilt(output) if kind == "gradient" or block == 2 else value

    heads = ["linear", "linear"]
    problem = problem_of(chain(), 3, loss=loss, heads=heads)
    net = Supernet(problem, problem.places(), CPU)
    optimizer, plan, data = sgd(net.parameters()), ((0, 0), (2, 1)), loader(3, seed=3)
    assert problem.places() == ["0", "1", "2"]
    stages = stages_of(chain())
    blocks = [
        nn.Sequential(stages[0]),
        nn.Sequential(*stages[1:3]),
        nn.Sequential(stages[3]),
    ]
    ours = [copy.deepcopy(net.heads[0][0]), copy.deepcopy(net.heads[2][1]), nn.Identity()]
    by_hand = sgd(
        [p for block, head in zip(blocks, ours, strict=True) for p in (*block.parameters(), *head.parameters())]
    )
    ends = itertools.count(1)
    for step, (x, y) in enumerate(data):
        now = step == 1
        if now:
            before = copy.deepcopy([net.state_dict()["modules"], optimizer.state_dict()["state"]])
            fault = net.train(named((x * math.nan if kind == "input" else x, y)), optimizer, plan)
            assert fault == said
            after = [net.state_dict()["modules"], optimizer.state_dict()["state"]]
            assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
            for old, new in zip(before[1].values(), after[1].values(), strict=True):
                assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
            assert all(p.grad is None for p in net.parameters())
            continue
        assert net.train(named((x, y)), optimizer, plan) == ""
        by_hand.zero_grad()
        h = x
        for block, head in zip(blocks, ours, strict=True):
            h = block(h.detach())
            cross_entropy(head(h), y).backward()
        by_hand.step()
    found = net.start()
    for name, ours_now in found.net.items():  # "2.0.weight": stage 2, in the block of the stages 1 and 2
        stage, _, inner = name.partition(".")
        mine = stages[min(int(stage), 3)].state_dict()[
            f"1.{inner}" if stage == "4" else f"0.{inner}" if stage == "3" else inner
        ]
        assert torch.allclose(ours_now, mine, rtol=1e-12, atol=1e-14), name
    for head, key in ((ours[0], ("0", 0)), (ours[1], ("2", 1))):
        for name, value in head.state_dict().items():
            assert torch.allclose(found.heads[key][name], value, rtol=1e-12, atol=1e-14), name


def comparison_of(loss: Any, steps: int, states: int = 0) -> tuple[Comparison, Any]:
    problem = problem_of(chain(), 3, loss=loss)
    comparison = Comparison(
        net=Supernet(problem, problem.places(), CPU),
        steps=steps,
        states=states,
        batch_size=None,
        descent=Descent(0.05, 0.9, 1e-4),
        cuts=2,
        seed=0,
    )
    return comparison, Effort.of(problem, problem.places(), 1)


def batches() -> Stream:
    return Stream(lambda: iter([named(batch) for batch in loader(6, seed=3)]), "training", 0)


def test_steps_that_are_left_out_are_counted_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    loss = Faulty()
    comparison, effort = comparison_of(loss, 6)
    start = loss.calls
    loss.bad = lambda call: call - start in range(4, 10)  # three calls a step: steps 1 and 2
    with caplog.at_level(logging.WARNING):
        comparison.run(batches(), effort, lambda: None)
    first = GRADIENT.format("4.2.bias") + " (training step 1)"
    assert comparison.skipped() == {"skipped_steps": {"count": 2, "first": first}}
    assert caplog.text.count("left out") == 1
    assert first in caplog.text
    again, _ = comparison_of(Faulty(), 6)
    again.load_state_dict(copy.deepcopy(comparison.state_dict()))
    assert again.skipped() == comparison.skipped()
    for value in comparison.net.state_dict()["modules"].values():
        assert value.isfinite().all()
    for damaged in (-1, 7, 1.5, None):
        state = {**comparison.state_dict(), "faults": [damaged, first]}
        with pytest.raises(ValueError, match="its count of steps left out is"):
            again.load_state_dict(state)


def test_a_comparison_that_is_left_out_leaves_batch_norm_as_it_was() -> None:
    comparison, _ = comparison_of(Faulty(), 2, states=1)
    before = [buffer.clone() for buffer in comparison.net.buffers()]
    x, y = loader()[0]
    comparison._compare(named((x * math.nan, y)))
    assert comparison.met == []
    assert len(before) > 10
    assert all(torch.equal(a, b) for a, b in zip(before, comparison.net.buffers(), strict=True))
    comparison._compare(named((x, y)))
    assert len(comparison.met) == 1


# ---- whole plans -----------------------------------------------------------------------------------------------------


def test_a_block_whose_gradient_is_not_finite_fails_and_the_others_train_on() -> None:
    problem = problem_of(chain(), 2, heads=["linear", spoiling])
    places = problem.places()
    plans = [tuple((places[p], k) for p, k in plan) for plan in every_plan([2] * len(places), 1)]
    good = [plan for plan in plans if plan[0][1] == 0]

    def tree_of(some: Any) -> PlanTree:
        return PlanTree(problem, some, sgd, local_loss_of(problem), CPU)

    tree, alone = tree_of(plans), tree_of(good)
    first = {(n.choice, n.last): copy.deepcopy(n.modules().state_dict()) for n in tree.nodes()}
    data = loader(3, seed=3)
    for step, batch in enumerate(data):
        tree.train(named(batch), step)
        alone.train(named(batch), step)
    for node in tree.nodes():
        failed = not node.last and node.choice[-1][1] == 1
        assert node.failed == failed
        name = f"2.bias of the head behind {node.choice[-1][0]}"
        assert node.fault == (f"{GRADIENT.format(name)} (block 0, step 0)" if failed else "")
        if failed:  # no weight has moved
            for key, parameter in node.modules().named_parameters():
                assert torch.equal(parameter, first[node.choice, node.last][key])
    assert tree.fault() == f"{GRADIENT.format(f'2.bias of the head behind {places[0]}')} (block 0, step 0)"
    kept = {(n.choice, n.last): n.modules().state_dict() for n in tree.nodes()}
    for node in alone.nodes():
        for key, value in node.modules().state_dict().items():
            assert torch.equal(value, kept[node.choice, node.last][key])
    scores = tree.evaluate([named(batch) for batch in loader(2, seed=5)])
    assert {plan for plan, score in scores.items() if math.isfinite(score)} == set(good)


# ---- whole searches --------------------------------------------------------------------------------------------------


def search(how: Any, loss: Any, **options: Any) -> sedona_fx.Plan:
    options = {"heads": ["linear", "sedona-1"], "blocks": 3, "progress": False, **options}
    return sedona_fx.decouple(chain(), loader(6), loss=loss, search=how, **options).plan


SEARCHES = {
    "rollout": (
        Rollout(steps=4, plans=4),
        r"in every plan, at step 1: the gradient of '.*' holds nan, .*block 0, step 0",
    ),
    "warm-up": (
        Rollout(steps=4, plans=4, warmup_steps=3),
        r"in each of 3 training steps: the gradient of '4.2.bias' hol",
    ),
    "guided": (
        Guided(training_steps=80, states=2, finalists=0),
        "in the gradients of every state: the gradient of '4.2",
    ),
    "best of": (
        BestOf(search=Uniform(), seeds=2, steps=2),
        "in the plans of all seeds: the gradient of '.*' holds nan, althoug",
    ),
    "sedona": (
        Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=1),
        "at warm-up step 0, base layer 3, in a gradi",
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_that_never_has_a_finite_gradient_says_so_and_what_to_do(name: str) -> None:
    how, said = SEARCHES[name]
    with pytest.raises(SearchDivergedError, match=said) as caught:
        search(how, Faulty(lambda call: True))
    assert "Lower `lr`, or check the data" in str(caught.value)
    assert "root, logarithm, norm or quotient at 0" in str(caught.value)
    assert (caught.value.plan is None) == (name != "sedona")  # alpha and beta as they are at the start
    assert ("holds nan, although the losses are finite" in caught.value.fault) == (name != "sedona")


def test_a_front_says_so_too() -> None:
    with pytest.raises(SearchDivergedError, match=r"in every plan, within 2 steps: the gradient of '.*' holds nan"):
        sedona_fx.pareto(
            chain(),
            loader(6),
            loss=Faulty(lambda call: True),
            blocks=3,
            points=2,
            search=Rollout(steps=2),
            heads=["linear"],
            progress=False,
        )


class SpoiltAt:
    """Cross-entropy, with a gradient that is not finite at some of its calls for training."""

    def __init__(self, bad: Collection[int]) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = cross_entropy(output, target)
        if not output.requires_grad:
            return value
        self.calls += 1
        return value + spoilt(output) if self.calls - 1 in self.bad else value


@pytest.mark.parametrize(("name", "steps"), [("guided", (1, 2)), ("warm-up", (1,))])
def test_a_search_with_some_bad_steps_goes_on_and_the_plan_lists_them(name: str, steps: tuple[int, ...]) -> None:
    before = SpoiltAt(())  # the loss is tried before any search begins
    search(Uniform(), before)
    bad = {before.calls + 3 * step + block for step in steps for block in range(3)}  # three blocks a step
    plan = search(SEARCHES[name][0], SpoiltAt(bad))
    skipped = plan.provenance["skipped_steps"]
    assert skipped["count"] == len(steps)
    assert "holds nan, although the losses are finite (training step" in skipped["first"]
    assert sedona_fx.Plan.from_json(plan.to_json()) == plan
    assert "skipped_steps" not in search(SEARCHES[name][0], cross_entropy).provenance
