"""Decoding by perturbation against a plain PyTorch loop, round by round; within limits, within its cost, resumable.

The oracle shares nothing with sedona_fx: the net is written out in functional calls, each base layer's gradient is
`autograd.grad` of its own Lt, and SGD is written by hand.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Capture
from tiny_search import SMALL, WORK, batches, loss, make_blocks, same
from torch import Tensor, nn

import sedona_fx
from sedona_fx import Limits
from sedona_fx.errors import BudgetError, SettingsError
from sedona_fx.search import Sedona
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State
from sedona_fx.search.sedona import bilevel, perturbation, sedona
from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.perturbation import Perturbed, perturb
from sedona_fx.search.sedona.plan_space import PlanSpace
from sedona_fx.search.sedona.relaxed_net import RelaxedGraphBlock as Block
from sedona_fx.search.sedona.result import SedonaResult
from sedona_fx.search.sedona.search_cost import Trials, share, share_seconds, share_trials
from sedona_fx.search.sedona.snapshots import Snapshot, SnapshotStore
from sedona_fx.search.sedona.steps import SedonaSteps
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import StepSeconds

LAYERS, WIDTH, CLASSES, STEPS = 4, 4, 3, 2
SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.05}
Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


# --- the net as blocks ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Linear, BatchNorm, tanh; then two heads (linear, and one hidden layer) or the classifier."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.last = i == LAYERS - 1
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        if self.last:
            self.out = nn.Linear(WIDTH, CLASSES)
        else:
            self.heads = nn.ModuleList(
                [nn.Linear(WIDTH, CLASSES), nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES))]
            )
            self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.norm(self.fc(x)))
        if self.last:
            return (), self.out(h)
        s = self.mix.softmax(0)
        return (h,), s[0] * self.heads[0](h) + s[1] * self.heads[1](h)


class Setup:
    """A net, a state of it, learned logits, and data, all in float64."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [Layer(i).double() for i in range(LAYERS)]
        self.blocks = [
            Block(m, m, (f"h{i - 1}" if i else "x",), (), None, None)
            if m.last
            else Block(m, m, (f"h{i - 1}" if i else "x",), (f"h{i}",), f"h{i}", "mix")
            for i, m in enumerate(layers)
        ]
        self.state = State.of(self.blocks)
        for d in self.state.momentum:
            for t in d.values():
                t += 0.1 * torch.randn_like(t)
        self.alpha = torch.randn(LAYERS - 1, 2, dtype=torch.float64)
        self.beta = [torch.randn(2, dtype=torch.float64) for _ in range(LAYERS - 1)]
        self.train = [self._batch() for _ in range(2 * STEPS)]
        self.val = [self._batch() for _ in range(2 * STEPS)]

    @staticmethod
    def _batch() -> Batch:
        return torch.randn(7, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (7,))

    def perturb(self, blocks: int, local_loss: Any = loss, choices: int = 6, **space: Any) -> Perturbed:
        def epochs(data: list[Batch]) -> Any:
            return lambda: iter([({"x": x}, y) for x, y in data])

        steps = SedonaSteps(Sedona(**SGD), RelaxedNet(self.blocks, local_loss), torch.Generator())
        train, val = Stream(epochs(self.train), "training", 0), Stream(epochs(self.val), "validation", 0)
        plans = PlanSpace(blocks, space.get("completes", lambda plan: True))
        trials = Trials(blocks - 1, choices, STEPS, 1.5)
        start = Snapshot(self.state, SGD["lr"])
        return perturb(steps, start, Logits(self.alpha, self.beta), plans, trials, train=train, val=val, seed=0)


# --- the oracle -------------------------------------------------------------------------------------------------------


def local_losses(w: Weights, mixtures: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    losses, h = [], x
    for i in range(LAYERS):
        n = f"{i}."
        z = F.linear(h, w[n + "fc.weight"], w[n + "fc.bias"])
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        h = torch.tanh(z * w[n + "norm.weight"] + w[n + "norm.bias"])
        if i == LAYERS - 1:
            out = F.linear(h, w[n + "out.weight"], w[n + "out.bias"])
        else:
            one = F.linear(h, w[n + "heads.0.weight"], w[n + "heads.0.bias"])
            hidden = torch.tanh(F.linear(h, w[n + "heads.1.0.weight"], w[n + "heads.1.0.bias"]))
            two = F.linear(hidden, w[n + "heads.1.2.weight"], w[n + "heads.1.2.bias"])
            out = mixtures[i][0] * one + mixtures[i][1] * two
        losses.append(F.cross_entropy(out, y))
    return losses


def trial(
    w: Weights, m: Weights, isolate: list[float], mixtures: list[Tensor], train: list[Batch], val: list[Batch]
) -> tuple[Weights, Weights, float]:
    """Train by the relaxed rule, by hand; return weights, momentum, and the mean validation loss."""
    for x, y in train:
        w = {n: t.detach().requires_grad_() for n, t in w.items()}
        losses = local_losses(w, mixtures, x, y)
        relaxed = [losses[-1]]
        for i in reversed(range(LAYERS - 1)):
            relaxed.insert(0, isolate[i] * losses[i] + (1 - isolate[i]) * relaxed[0])
        g = {
            n: torch.autograd.grad((losses if "heads" in n else relaxed)[int(n[0])], t, retain_graph=True)[0]
            for n, t in w.items()
        }
        m = {n: SGD["momentum"] * m[n] + g[n] + SGD["weight_decay"] * w[n].detach() for n in w}
        w = {n: w[n].detach() - SGD["lr"] * m[n] for n in w}
    mean = sum(local_losses(w, mixtures, x, y)[-1].item() for x, y in val) / len(val)
    return w, m, mean


def by_hand(s: Setup, blocks: int) -> list[tuple[dict[tuple[int, int], float], tuple[int, int]]]:
    """Each round's losses by (place, head), and its winner."""
    w = {f"{i}.{n}": t.clone() for i, d in enumerate(s.state.params) for n, t in d.items()}
    m = {f"{i}.{n}": t.clone() for i, d in enumerate(s.state.momentum) for n, t in d.items()}
    isolate = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in s.alpha.tolist()]
    mixtures = [torch.softmax(b, 0) for b in s.beta]
    taken: set[int] = set()
    rounds = []
    for k in range(blocks - 1):
        data = s.train[STEPS * k : STEPS * (k + 1)], s.val[STEPS * k : STEPS * (k + 1)]
        found = {}
        for place, head in itertools.product(sorted(set(range(LAYERS - 1)) - taken), range(2)):
            p = [1.0 if i == place else t for i, t in enumerate(isolate)]
            q = [torch.eye(2, dtype=torch.float64)[head] if i == place else t for i, t in enumerate(mixtures)]
            found[place, head] = (*trial(w, m, p, q, *data), p, q)
        winner = min(found, key=lambda choice: found[choice][2])
        rounds.append(({choice: outcome[2] for choice, outcome in found.items()}, winner))
        w, m, _, isolate, mixtures = found[winner]
        taken.add(winner[0])
    return rounds


# --- the rounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_trial_is_a_plain_loop_and_the_least_loss_wins(blocks: int, seed: int) -> None:
    s = Setup(seed)
    found, wanted = s.perturb(blocks), by_hand(s, blocks)
    assert len(found.rounds) == len(wanted) == blocks - 1
    for ours, (losses, winner) in zip(found.rounds, wanted, strict=True):
        assert {(k, m) for k, m, _ in ours.tried} == set(losses)
        assert max(losses.values()) - min(losses.values()) > 1e-4  # choices do differ
        for k, m, value in ours.tried:
            assert value == pytest.approx(losses[k, m], rel=1e-11)
        assert ours.kept == winner
        assert ours.open == len(losses)
    assert list(zip(found.cuts, found.heads, strict=True)) == sorted(winner for _, winner in wanted)
    assert found.equivalent_steps == sum(len(losses) for losses, _ in wanted) * STEPS * 1.5


def test_what_it_starts_from_is_left_as_it_is() -> None:
    s = Setup()
    state = [*s.state.params, *s.state.buffers, *s.state.momentum]
    tensors = [s.alpha, *s.beta, *(t for tensors in state for t in tensors.values())]
    before = [t.clone() for t in tensors]
    first = s.perturb(3)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert first == s.perturb(3)


def test_all_trials_of_a_round_draw_the_same() -> None:
    """At a learning rate of 0 a choice changes nothing: with dropout, outputs of all trials are the same bits."""
    blocks = make_blocks()
    drawn: list[Tensor] = []

    def spy(block: int, output: Tensor, target: Tensor) -> Tensor:
        if block == 3:
            drawn.append(output.detach().clone())
        return loss(block, output, target)

    steps = SedonaSteps(SMALL, RelaxedNet(blocks, spy), torch.Generator())
    train, val = Stream(batches(), "training", 0), Stream(batches(), "validation", 0)
    start, zeros = Snapshot(State.of(blocks), 0.0), Logits(torch.zeros(3, 2), [torch.zeros(2)] * 3)
    space = PlanSpace(2, lambda plan: True)
    perturb(steps, start, zeros, space, Trials(1, 6, 2, 1.0), train=train, val=val, seed=0)
    per_trial = [drawn[k : k + 4] for k in range(0, len(drawn), 4)]  # two training steps, two validation batches
    assert len(per_trial) == 6
    for outputs in per_trial[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, per_trial[0], strict=True))
    assert not torch.equal(per_trial[0][0], per_trial[0][1])


class Spoiled:
    """A loss that is NaN from one call to another."""

    def __init__(self, first: int, last: float) -> None:
        self.first, self.last, self.calls = first, last, -1

    def __call__(self, block: int, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return loss(block, output, target) * (math.nan if self.first <= self.calls <= self.last else 1.0)


@pytest.mark.parametrize("call", [1, LAYERS * STEPS + 1], ids=["in training", "in validation"])
def test_a_loss_that_is_not_finite_is_infinitely_bad(call: int) -> None:
    s = Setup()
    first = s.perturb(2).rounds[0].tried[0][:2]
    spoiled = s.perturb(2, Spoiled(call, call))
    losses, _ = by_hand(s, 2)[0]
    (k, m, value), *others = spoiled.rounds[0].tried
    assert ((k, m), value) == (first, math.inf)
    assert all(value == pytest.approx(losses[k, m], rel=1e-11) for k, m, value in others)
    del losses[first]
    assert spoiled.rounds[0].kept == min(losses, key=lambda choice: losses[choice])
    record = spoiled.record(["a", "b", "c"], {p: ["one", "two"] for p in "abc"})
    assert record["rounds"][0]["tried"][0]["val_loss"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_where_nothing_is_finite_the_learned_weights_decide() -> None:
    s = Setup()
    found = s.perturb(3, Spoiled(0, math.inf))
    odds = (s.alpha[:, 0] - s.alpha[:, 1]).tolist()
    scores = {(k, m): odds[k] + s.beta[k].log_softmax(0)[m].item() for k in range(3) for m in range(2)}
    best = max(scores, key=lambda choice: scores[choice])
    second = max((c for c in scores if c[0] != best[0]), key=lambda choice: scores[choice])
    assert [r.kept for r in found.rounds] == [best, second]


def test_the_learned_weights_prune() -> None:
    s = Setup()
    odds = (s.alpha[:, 0] - s.alpha[:, 1]).tolist()
    scores = {(k, m): odds[k] + s.beta[k].log_softmax(0)[m].item() for k in range(3) for m in range(2)}
    ranked = sorted(scores, key=lambda choice: -scores[choice])
    found, wanted = s.perturb(2, choices=3), by_hand(s, 2)[0][0]
    assert [(k, m) for k, m, _ in found.rounds[0].tried] == ranked[:3]
    assert found.rounds[0].kept == min(ranked[:3], key=lambda choice: wanted[choice])
    assert found.rounds[0].open == 6


# --- within limits ----------------------------------------------------------------------------------------------------


def small_head(context: Any) -> nn.Module:
    return nn.Linear(context.shape[1], 3)


def large_head(context: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(context.shape[1], 40), nn.ReLU(), nn.Linear(40, 3))


WIDTHS, SAMPLES = (6, 20, 4, 30, 12, 8), 5
PLACES = 4  # the last two layers stay together
DATA = [(torch.linspace(-1, 1, 6 * SAMPLES).view(SAMPLES, 6), torch.tensor([0, 1, 2, 0, 1]))] * 4
ALL = Sedona(warmup_steps=3, meta_steps=2, snapshots=1, unroll=1, decode="perturbation", perturbation_steps=1)


def decoupled(search: Any, **how: Any) -> sedona_fx.Plan:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(WIDTHS)]
    net = nn.Sequential(*parts, nn.Linear(WIDTHS[-1], 3))
    heads = [large_head, small_head]
    return sedona_fx.decouple(net, DATA, search=search, heads=heads, progress=False, **({"blocks": 3} | how)).plan


def flops(plan: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The largest block's FLOPs and the heads', from the widths; places are layers, head 0 is the large one."""
    layers = [2 * SAMPLES * a * b for a, b in itertools.pairwise((*WIDTHS, 3))]
    heads = [2 * SAMPLES * (WIDTHS[k + 1] * 40 + 40 * 3 if m == 0 else WIDTHS[k + 1] * 3) for k, m in plan]
    edges = [0, *(k + 1 for k, _ in plan), len(layers)]
    blocks = [sum(layers[a:b]) for a, b in itertools.pairwise(edges)]
    return max(b + h for b, h in zip(blocks, [*heads, 0], strict=True)), sum(heads)


def all_plans(blocks: int) -> list[tuple[tuple[int, int], ...]]:
    return [
        tuple(zip(cuts, heads, strict=True))
        for cuts in itertools.combinations(range(PLACES), blocks - 1)
        for heads in itertools.product(range(2), repeat=blocks - 1)
    ]


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("measure", ["block_flops", "head_flops", "both"])
def test_every_round_tries_what_some_allowed_plan_completes_and_nothing_else(blocks: int, measure: str) -> None:
    costs = {plan: flops(plan) for plan in all_plans(blocks)}
    largest, heads = (sorted(c[j] for c in costs.values())[len(costs) // 3] for j in (0, 1))
    given = {"block_flops": largest, "head_flops": heads}
    given = given if measure == "both" else {measure: given[measure]}
    limits = (given.get("block_flops", math.inf), given.get("head_flops", math.inf))
    fitting = [plan for plan, (b, h) in costs.items() if b <= limits[0] and h <= limits[1]]
    assert 0 < len(fitting) < len(costs)
    found = decoupled(ALL, blocks=blocks, budget=Limits(**given))
    places = found.provenance["places"]
    assert len(places) == PLACES
    hard: set[tuple[int, int]] = set()
    for r in found.provenance["decoding"]["rounds"]:
        tried = {(places.index(t["cut"]), t["candidate"]) for t in r["tried"]}
        assert tried == {c for plan in fitting if hard <= set(plan) for c in set(plan) - hard}
        losses = {(places.index(t["cut"]), t["candidate"]): t["val_loss"] for t in r["tried"]}
        kept = (places.index(r["kept"]["cut"]), r["kept"]["candidate"])
        assert losses[kept] == min(losses.values())
        hard.add(kept)
    assert tuple(sorted(hard)) in fitting
    names = ["large_head", "small_head"]
    assert [places[k] for k, _ in sorted(hard)] == list(found.cuts)
    assert all(names[m] in str(h) for (_, m), h in zip(sorted(hard), found.heads, strict=True))


def test_limits_that_no_plan_meets_are_refused_before_the_search() -> None:
    capture = Capture()
    decoupled(capture)
    with pytest.raises(BudgetError, match="needs less than"):
        PlanSpace.of(replace(capture.problem, limits=Limits(head_flops=1)))


# --- the whole search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 3])
def test_the_plan_says_what_was_tried_and_argmax_is_what_it_was(blocks: int) -> None:
    found = decoupled(ALL, blocks=blocks)
    again = decoupled(ALL, blocks=blocks)
    assert found == again
    assert sedona_fx.Plan.from_json(found.to_json()) == found
    p = found.provenance
    assert p["decoding"]["by"] == "perturbation"
    assert [len(r["tried"]) for r in p["decoding"]["rounds"]] == [8, 6][: blocks - 1]
    assert sorted(r["kept"]["cut"] for r in p["decoding"]["rounds"]) == sorted(found.cuts)
    assert p["decoding"]["steps"] == 1
    assert p["cost"]["decoding_steps"] > 0

    plain = decoupled(replace(ALL, decode="argmax", perturbation_steps=None), blocks=blocks)
    q = plain.provenance
    assert q["alpha"] == p["alpha"]  # the search itself is the same
    assert q["beta"] == p["beta"]
    assert {"decoding"} == p.keys() - q.keys()
    assert {"decoding_steps"} == p["cost"].keys() - q["cost"].keys()
    odds = [a - b for a, b in q["alpha"]]
    cuts = sorted(sorted(range(len(odds)), key=lambda k: -odds[k])[: blocks - 1])
    assert list(plain.cuts) == [q["places"][k] for k in cuts]


def run(settings: Sedona, blocks: int = 3, **more: Any) -> SedonaResult:
    space = PlanSpace(blocks, lambda plan: True)
    return settings.run(
        make_blocks(),
        more.pop("local_loss", loss),
        train_batches=more.pop("train", None) or batches(),
        val_batches=batches(size=16),
        work=WORK,
        seed=0,
        progress=False,
        space=space,
    )


TINY = replace(SMALL, decode="perturbation", perturbation_steps=2)


@pytest.mark.parametrize("bad", [False, True])
def test_it_starts_from_the_last_good_snapshot(bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    last: dict[int, State] = {}
    given: list[tuple[State, float]] = []

    class Watched(SnapshotStore):
        def put(self, index: int, state: State, lr: float) -> None:
            last[index] = state.clone()
            super().put(index, state, lr)

    step = BilevelSearch._meta_iteration

    def spoiled(self: BilevelSearch, index: int) -> Any:
        if bad and index == 2:  # the last one turns out to be bad
            self.history.bad_snapshots.append(index)
            return None
        return step(self, index)

    def spy(steps: Any, start: Snapshot, *args: Any, **more: Any) -> Perturbed:
        given.append((start.state.clone(), start.lr))
        return perturb(steps, start, *args, **more)

    monkeypatch.setattr(sedona, "SnapshotStore", Watched)
    monkeypatch.setattr(sedona, "perturb", spy)
    monkeypatch.setattr(BilevelSearch, "_meta_iteration", spoiled)
    run(TINY)  # snapshots behind 2, 4 and 6 warm-up steps
    ((start, lr),) = given
    wanted = last[1 if bad else 2]
    for kind in ("params", "buffers", "momentum"):
        for ours, theirs in zip(getattr(start, kind), getattr(wanted, kind), strict=True):
            assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert not torch.equal(last[1].params[0]["fc.weight"], last[2].params[0]["fc.weight"])
    low = 0.05 / 100
    assert lr == pytest.approx(low + (0.05 - low) * (1 + math.cos(math.pi * (4 / 6 if bad else 1.0))) / 2)


@pytest.mark.parametrize("snapshot_bytes", [0, None])
def test_decoding_that_was_killed_starts_anew_and_ends_the_same(snapshot_bytes: int | None, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    settings = replace(TINY, snapshot_bytes=snapshot_bytes)
    whole = run(settings)
    here = replace(settings, folder=tmp_path, save_seconds=0.0)
    trial_of = perturbation._trial
    count = 0

    def killing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:  # in the second round
            raise Killed
        return trial_of(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbation, "_trial", killing)
        with pytest.raises(Killed):
            run(here)
        patch.setattr(perturbation, "_trial", trial_of)
        patch.setattr(BilevelSearch, "_train", None)  # the search itself is finished
        patch.setattr(BilevelSearch, "_meta_iteration", None)
        for _ in range(2):
            torch.manual_seed(5)
            again = run(here)
            assert same(whole, again)
            assert whole.decoding == again.decoding is not None
            assert whole.cost == again.cost
        two = run(here, blocks=2)  # any number of blocks from one search
        assert two.decoding == run_of(settings, 2)
    assert len(list(tmp_path.iterdir())) == 2  # the journal, and the snapshot to decode from


def run_of(settings: Sedona, blocks: int) -> Perturbed | None:
    with pytest.MonkeyPatch.context() as patch:
        for name, function in ORIGINAL.items():
            patch.setattr(BilevelSearch, name, function)
        return run(settings, blocks).decoding


ORIGINAL = {name: getattr(BilevelSearch, name) for name in ("_train", "_meta_iteration")}


def test_ctrl_c_while_decoding_leaves_what_was_learned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(TINY)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(perturbation, "_trial", interrupted)
    found = run(TINY)
    assert found.interrupted
    assert found.decoding is None
    assert same(whole, found)
    assert "the learned weights decide" in caplog.text
    assert len(decoupled(ALL).cuts) == 2


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training_steps", [200, 1000, 54_321])
@pytest.mark.parametrize("heads", [0.1, 3.0, 18.0])
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("steps", [None, 1])
def test_search_and_decoding_keep_within_the_training_steps(
    training_steps: int, heads: float, blocks: int, steps: int | None
) -> None:
    work = RelaxedWork(1.0, heads)
    if training_steps < 10_000 and heads > 1:
        training_steps *= 20
    settings = Sedona(training_steps=training_steps, unroll=1, decode="perturbation", perturbation_steps=steps)
    budget = share(settings, work)
    choices = 60
    trials = share_trials(budget.decoding_cost, work, blocks - 1, choices, steps)
    assert budget.equivalent_steps + trials.equivalent_steps <= training_steps
    assert 2 <= trials.choices <= choices
    assert trials.step_cost == pytest.approx(1 + heads + 1 / 3)
    one_more = trials.equivalent_steps / trials.choices
    assert trials.choices == choices or trials.equivalent_steps + one_more > budget.decoding_cost
    if steps is None:
        assert 5 <= trials.steps <= 50
        assert trials.choices == choices or trials.steps == 5


def test_of_seconds_a_quarter_is_for_decoding() -> None:
    settings = Sedona(seconds=500.0, unroll=1, decode="perturbation")
    step_seconds = StepSeconds(relaxed_seconds=0.5, meta_seconds=2.0)
    budget = share_seconds(settings, RelaxedWork(1.0, 3.0), step_seconds, 400.0)
    assert (budget.warmup_steps, budget.meta_steps) == (300, 75)
    assert budget.decoding_cost == pytest.approx(100.0 / 0.5 * 4.0)  # a relaxed step costs four plain ones


def test_the_cost_is_stated_before_the_start_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Of 400 steps 300 buy 100 relaxed ones of 1.5 and 15 meta-iterations of 9.5; a third of these 292.5 is left.

    A step of a trial costs 1.5 + 2/3: 97.5 would pay for 3 steps of all 6 choices in 2 rounds, so 4 are tried for 5.
    """
    settings = Sedona(training_steps=400, unroll=1, decode="perturbation")
    with caplog.at_level(logging.INFO):
        found = run(settings)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(("SEDONA", "decoding"))]
    decoding = "decoding by perturbation: 2 rounds of at most 4 choices, 5 steps each = 87 training steps"
    assert said[0] == decoding
    assert said[1].startswith("SEDONA: 115 relaxed steps + 15 meta-iterations = 292 training steps")
    assert said[2] == decoding
    assert found.decoding is not None
    assert [len(r.tried) for r in found.decoding.rounds] == [4, 4]
    assert found.cost["decoding_steps"] == pytest.approx(2 * 4 * 5 * (1.5 + 2 / 3))
    assert found.cost["equivalent_steps"] + found.cost["decoding_steps"] <= 400


def test_seconds_pay_for_decoding_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bilevel, "measure", lambda *args: StepSeconds(relaxed_seconds=1.0, meta_seconds=1.2))
    settings = Sedona(seconds=100.0, unroll=1, decode="perturbation", perturbation_steps=2)
    with caplog.at_level(logging.INFO):
        found = run(settings)
    assert (found.cost["relaxed_steps"], found.cost["meta_iterations"]) == (37 + 31, 31)
    # 25 s of relaxed steps, each worth 1.5; a choice costs 2 (1.5 + 2/3) in each of 2 rounds.
    assert "2 rounds of at most 4 choices, 2 steps each = 35 training steps, about 00:24" in caplog.text


def test_a_cost_too_small_says_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"Let the search cost \d+\.\d times as much, lower perturbation_steps, or"):
        run(replace(SMALL, decode="perturbation", perturbation_steps=None))
    with pytest.raises(SettingsError, match="take decode='argmax'"):
        decoupled(replace(ALL, meta_steps=None, training_steps=200, perturbation_steps=40))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decode='best'\): 'argmax' or 'perturbation'"):
        Sedona(decode="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"perturbation_steps=5\): needs decode='perturbation'"):
        Sedona(perturbation_steps=5)
    with pytest.raises(ValueError, match=r"perturbation_steps=0\): has to be at least 1"):
        Sedona(decode="perturbation", perturbation_steps=0)
    assert Sedona().decode == Sedona.paper().decode == "argmax"
