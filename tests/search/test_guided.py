"""The guided search: within its cost and the plan's budget, on any model, and nothing of the user's is touched."""

from __future__ import annotations

import copy
import logging
import math
import random
import re
from dataclasses import replace
from typing import Any

import killable
import numpy as np
import pytest
import torch
from small_conv import HEADS, chain, every_plan, loader, problem_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.errors import BudgetError, CutError, DataError, SearchDivergedError, SettingsError
from sedona_fx.rng import random_states
from sedona_fx.search import Guided, Limits, Problem
from sedona_fx.search.guided_run import GuidedRun
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.problem.problem import SearchData
from sedona_fx.search.trials.effort import Effort
from sedona_fx.search.trials.gradient_comparison import measure
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.supernet import Supernet

QUICK = Guided(training_steps=150, states=2, finalists=3, batch_size=3, val_batches=1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(chain(4), 3)


def decoupled(model: nn.Module, data: Any, search: Any = QUICK, blocks: int = 3, **more: Any) -> sedona_fx.Plan:
    return sedona_fx.decouple(model, data, blocks=blocks, search=search, progress=False, **more).plan


def as_if_in_50_ms(run: Any, device: torch.device) -> float:
    run()
    return 0.05


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finalists", [0, 2, 6])
@pytest.mark.parametrize("batches", [1, 4])
def test_the_number_of_steps_that_the_error_names_will_do(problem: Problem, batches: int, finalists: int) -> None:
    data = SearchData(lambda: problem.data.train(), problem.data.val, batches)  # type: ignore[union-attr]
    here = replace(problem, data=data)
    search = replace(QUICK, finalists=finalists)
    with pytest.raises(
        SettingsError, match=r"training_steps=1 does not pay for a search: .* Raise training_steps to"
    ) as at:
        replace(search, training_steps=1).decide(here)
    need = int(str(at.value).split("Raise training_steps to ")[1].split(" ")[0])
    for steps in range(need, need + 12):
        found = replace(search, training_steps=steps).decide(here)
        assert len(found.cuts) == 2
        assert found.provenance["states"] >= 1
        assert found.provenance["cost"]["equivalent_steps"] <= steps
    with pytest.raises(SettingsError, match=f"to {need} or more"):
        replace(search, training_steps=need - 1).decide(here)


@pytest.mark.parametrize("steps", [40, 90, 200])
@pytest.mark.parametrize("states", [1, 5])
def test_it_does_what_it_says_and_keeps_within_its_cost(
    problem: Problem, steps: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"steps": 0, "states": 0, "rollouts": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            done[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(Supernet, "train", counted("steps", Supernet.train))
    monkeypatch.setattr("sedona_fx.search.trials.gradient_comparison.measure", counted("states", measure))
    monkeypatch.setattr(PlanTree, "train", counted("rollouts", PlanTree.train))
    found = replace(QUICK, training_steps=steps, states=states).decide(problem).provenance
    cost = found["cost"]
    assert cost["equivalent_steps"] <= steps
    assert [cost["warmup_steps"], cost["rollout_steps"]] == [done["steps"], done["rollouts"]]
    assert 1 <= found["states"] == done["states"] <= cost["states"] <= states
    assert bool(found["rounds"]) == bool(done["rollouts"])
    assert not found["interrupted"]


def test_seconds_are_turned_into_steps(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    search = replace(QUICK, training_steps=None, seconds=2.0)
    monkeypatch.setattr("sedona_fx.search.trials.effort.seconds_of", as_if_in_50_ms)
    few, many = search.decide(problem), replace(search, seconds=6.0).decide(problem)
    assert few.provenance["cost"]["seconds"] == 2.0
    assert many.provenance["cost"]["equivalent_steps"] > 2 * few.provenance["cost"]["equivalent_steps"]
    with pytest.raises(SettingsError, match=r"seconds=0\.01 does not pay for a search.* Raise seconds to") as at:
        replace(search, seconds=0.01).decide(problem)
    need = float(str(at.value).split("Raise seconds to ")[1].split(" ")[0])
    assert replace(search, seconds=need).decide(problem).cuts


def test_without_finalists_gradients_decide_alone(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanTree, "train", None)
    for finalists in (0, 1):
        found = replace(QUICK, finalists=finalists).decide(problem).provenance
        assert found["rounds"] == []
        assert found["cost"]["rollout_steps"] == 0
        assert found["decided_by"] == "gradients"


def test_rollouts_decide_by_the_least_validation_loss(problem: Problem) -> None:
    decision = QUICK.decide(problem)
    best, loss = decision.provenance["rounds"][-1]["scores"][0]
    assert [[cut, head] for cut, head in zip(decision.cuts, decision.heads, strict=True)] == best
    assert loss == min(score for _, score in decision.provenance["rounds"][-1]["scores"])
    assert decision.provenance["decided_by"] == "rollouts"


def test_its_plan_keeps_within_a_budget(problem: Problem) -> None:
    places = problem.places()
    free = QUICK.decide(problem)
    assert len(free.provenance["scores"]) == len(places)
    heads = plan_costs(problem).heads["head_flops"]
    totals = sorted({sum(heads[p][k] for p, k in plan) for plan in every_plan([2] * len(places), 2)})
    for most in totals[:: len(totals) // 3]:
        decision = QUICK.decide(replace(problem, limits=Limits(head_flops=most)))
        chosen = [problem.candidates[p].index(h) for p, h in zip(decision.cuts, decision.heads, strict=True)]  # type: ignore[arg-type]
        assert sum(heads[places.index(p)][k] for p, k in zip(decision.cuts, chosen, strict=True)) <= most
    with pytest.raises(BudgetError):
        QUICK.decide(replace(problem, limits=Limits(head_flops=totals[0] - 1)))


# --- what it leaves alone ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan(problem: Problem) -> None:
    first = QUICK.decide(problem)
    torch.manual_seed(9)
    assert QUICK.decide(problem) == first
    other = QUICK.decide(replace(problem, seed=8))
    assert other.provenance["scores"] != first.provenance["scores"]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_users_model_is_not_touched(mode: bool) -> None:
    model = chain(4, drop=0.2).train(mode)
    model[0].requires_grad_(False)
    model[2][1].eval()
    before = copy.deepcopy(model)
    net = sedona_fx.decouple(model, loader(), blocks=3, search=QUICK, heads=HEADS, progress=False)
    assert net.plan.provenance["search"] == "guided"
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(net.model.state_dict()[name], theirs), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batches", [None, 4], ids=["length unknown", "length known"])
@pytest.mark.parametrize("name", ["guided", "rollout"])
def test_all_random_streams_are_given_back(name: str, batches: int | None) -> None:
    """On data that draws from all of them, in training and in validation."""
    problem = problem_of(killable.model(), 3, _noisy(), val_data=_noisy(), heads=["tokens-1", "tokens-2"])
    assert problem.data is not None
    problem = replace(problem, data=replace(problem.data, epoch_batches=batches))
    search = replace(killable.SEARCHES[name](None), **({"finalists": 2} if name == "guided" else {"steps": None}))
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    before, graphs = random_states([]), copy.deepcopy(problem.train.state_dict())
    first = replace(search, training_steps=60).decide(problem)
    after = random_states([])
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert all(torch.equal(value, problem.train.state_dict()[key]) for key, value in graphs.items())
    random.random()
    assert replace(search, training_steps=60).decide(problem) == first


@pytest.mark.parametrize("name", ["guided", "rollout"])
def test_no_accelerator_is_seeded(problem: Problem, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    few = {"guided": {"finalists": 2, "training_steps": 60}, "rollout": {"steps": 2, "warmup_steps": 1, "plans": 2}}
    replace(killable.SEARCHES[name](None), **few[name]).decide(problem)
    assert seeded == []


def _noisy() -> Any:
    return torch.utils.data.DataLoader(killable.Noisy(1), batch_size=6, shuffle=True)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def press_at(monkeypatch: pytest.MonkeyPatch, owner: Any, step: int) -> None:
    train, steps = owner.train, 0

    def pressed(self: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(owner, "train", pressed)


def test_ctrl_c_among_the_gradients_decides_by_those_met(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = replace(QUICK, states=6)
    whole = search.decide(problem)
    press_at(monkeypatch, Supernet, whole.provenance["cost"]["warmup_steps"] - 1)
    with caplog.at_level(logging.WARNING):
        found = search.decide(problem)
    assert found.provenance["interrupted"]
    assert found.provenance["rounds"] == []
    assert 1 <= found.provenance["states"] < whole.provenance["states"]
    assert found.provenance["cost"]["equivalent_steps"] < whole.provenance["cost"]["equivalent_steps"]
    assert "interrupted at step" in caplog.text


def test_ctrl_c_before_any_gradient_goes_through(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    press_at(monkeypatch, Supernet, 2)
    with pytest.raises(KeyboardInterrupt):
        QUICK.decide(problem)


@pytest.mark.parametrize("step", [1, 5])
def test_ctrl_c_among_the_rollouts_decides_by_the_last_round(
    problem: Problem, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = QUICK.decide(problem)
    press_at(monkeypatch, PlanTree, step)
    found = QUICK.decide(problem)
    assert found.provenance["interrupted"]
    rounds = [seen for seen in whole.provenance["rounds"] if seen["step"] < step]
    assert found.provenance["rounds"] == rounds
    chosen = [[cut, head] for cut, head in zip(found.cuts, found.heads, strict=True)]
    if rounds:
        assert chosen == rounds[-1]["scores"][0][0]
    else:
        assert found.provenance["decided_by"] == "gradients"
        assert chosen in [plan for plan, _ in whole.provenance["rounds"][0]["scores"]]


def test_where_all_rollouts_diverge_gradients_decide(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PlanTree, "evaluate", lambda tree, batches: dict.fromkeys(tree.plans(), math.inf))
    found = QUICK.decide(problem)
    best, _ = found.provenance["plans"][0]
    assert [[cut, head] for cut, head in zip(found.cuts, found.heads, strict=True)] == best
    assert found.provenance["decided_by"] == "gradients"
    assert "infinite" in found.provenance["without_rollouts"]
    assert "gradients decide alone" in caplog.text


def test_a_single_comparison_is_warned_of(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    effort = Effort.of(problem, problem.places(), 1)
    least = replace(QUICK, training_steps=effort.least, states=8, finalists=0)
    assert least.decide(problem).provenance["cost"]["states"] == 1
    enough = int(re.findall(r"training_steps=(\d+) or more", caplog.text)[0])
    caplog.clear()
    found = replace(least, training_steps=enough).decide(problem)
    assert found.provenance["cost"]["states"] == 2
    replace(least, states=1).decide(problem)  # as asked for
    assert "noise" not in caplog.text


def test_it_says_how_long_it_will_take(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as timing a few steps is not worth speaking of; the decision does not depend on it."""
    long = replace(QUICK, training_steps=2000)
    monkeypatch.setattr(GuidedRun, "decide", lambda run: run._plan_steps(None))
    with caplog.at_level(logging.INFO, "sedona_fx"):
        QUICK.decide(problem)
        assert "about" not in caplog.text
        monkeypatch.setattr("sedona_fx.search.trials.effort.seconds_of", as_if_in_50_ms)
        shares, effort, _ = long.decide(problem)
    seconds = 0.1 * shares.cost / (effort.warmup_step + effort.comparison)
    assert f"about 00:{math.ceil(seconds):02d}" in caplog.text


# --- models of all kinds ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Words in and words out; the target has another first dimension than the input."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.out(h)


def word_loss(output: Tensor, target: Tensor) -> Tensor:
    rows = output.flatten(0, 1)
    return cross_entropy(rows, target[: len(rows)])


def words() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(9, (6, 4), generator=g), torch.randint(9, (24,), generator=g)) for _ in range(3)]


LONG = replace(QUICK, training_steps=400, finalists=2)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_batches_that_cannot_be_split_are_taken_whole(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train = Supernet.train

    def spy(self: Supernet, batch: Any, *args: Any) -> None:
        seen.append(len(batch[1]))
        train(self, batch, *args)

    monkeypatch.setattr(Supernet, "train", spy)
    found = decoupled(Words(False), words(), replace(LONG, batch_size=batch_size), loss=word_loss, heads=["logits-1"])
    assert set(seen) == {24}
    assert found.provenance["rounds"]


def test_shared_parameters_leave_the_decision_to_the_gradients() -> None:
    """Blocks that share a weight are not independent of what follows, so rollouts could not share their prefixes."""
    found = decoupled(Words(True), words(), LONG, loss=word_loss, heads=["logits-1"])
    free = decoupled(Words(False), words(), LONG, loss=word_loss, heads=["logits-1"])
    assert free.provenance["decided_by"] == "rollouts"
    assert found.provenance["decided_by"] == "gradients"
    assert "share" in found.provenance["without_rollouts"]
    assert "without_rollouts" not in free.provenance
    assert found.provenance["rounds"] == []
    assert found.provenance["cost"]["warmup_steps"] > free.provenance["cost"]["warmup_steps"]  # nothing is lost
    assert found.provenance["cost"]["rollout_steps"] == 0
    assert len(found.cuts) == 2


class Exported(nn.Module):
    """Code that only torch.export can record, for one batch size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            x = x.reshape(x.shape[0], 2, 3).flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


@pytest.mark.parametrize("seconds", [False, True])
def test_a_graph_for_one_batch_size_gets_whole_batches(seconds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(12, 6, generator=g), torch.randint(3, (12,), generator=g)) for _ in range(4)]
    search = QUICK
    if seconds:
        monkeypatch.setattr("sedona_fx.search.trials.effort.seconds_of", as_if_in_50_ms)
        search = replace(QUICK, training_steps=None, seconds=3.0)
    found = decoupled(Exported(), data, search, heads=["tokens-1", "tokens-2"])
    assert found.capture.front_end == "export"
    assert found.capture.free_batch is False
    assert len(found.cuts) == 2


def test_a_frozen_beginning_is_no_obstacle() -> None:
    model = chain(4)
    model[0].requires_grad_(False)
    found = decoupled(model, loader(), heads=HEADS)
    assert all(math.isfinite(term) for row in found.provenance["scores"] for term in row)


def test_any_number_of_blocks() -> None:
    for blocks in (2, 4):
        assert decoupled(chain(4), loader(), blocks=blocks, heads=HEADS).blocks == blocks
    assert decoupled(chain(4), loader(), blocks=1, heads=HEADS).cuts == ()


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_without_heads_or_data_it_says_so(problem: Problem) -> None:
    with pytest.raises(CutError, match="heads=False"):
        decoupled(chain(4), loader(), heads=False)
    with pytest.raises(DataError, match="needs data"):
        QUICK.decide(replace(problem, data=None))


def test_when_no_gradient_is_finite_it_says_so(problem: Problem) -> None:
    def bad() -> Any:
        for args, target in problem.data.train():  # type: ignore[index]
            yield sedona_fx.Args(input=args.kwargs["input"] * math.nan), target

    with pytest.raises(SearchDivergedError, match="in the gradients of every state"):
        QUICK.decide(replace(problem, data=replace(problem.data, train=bad)))  # type: ignore[index]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training_steps": 0}, "training_steps=0"),
        ({"states": 0}, "states=0"),
        ({"finalists": -1}, "finalists=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_batch_size": 0}, "val_batch_size=0"),
        ({"seconds": 0.0}, "above 0"),
        ({"seconds": 1.0, "training_steps": 5}, "give one"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guided(**given)
