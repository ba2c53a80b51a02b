"""Every schedule, stopped after any step and gone on with in a fresh net, ends bit for bit where it would have."""

import copy
import functools
from functools import partial

import pytest
import torch
from kinds import ALL
from resuming import LOADERS, assert_equal, assert_killed_runs_agree, disturb
from small import Chain, batch, batches, make_net, sgd
from torch import nn

from sedona_fx.errors import CheckpointError
from sedona_fx.train import (
    BackLink,
    Backprop,
    Delayed,
    Greedy,
    InfoPro,
    KineticEnergy,
    PredSim,
    Replay,
    VectorQuantizer,
)

TOTAL = 8
HALF = {"autocast": torch.float16}
EXTRA = [PredSim(0.5, keep=0.5), InfoPro(0.1), KineticEnergy(0.1)]
BUSY = {"capacity": 2, "noise": [0.2, 0.5, 0.3, 0.4]}


def adam(params):
    return torch.optim.AdamW(params, lr=0.01, amsgrad=True)


SCHEDULES = {
    "greedy": Greedy,
    "greedy sync, windows of 2": partial(Greedy, check="sync", accumulate=2, clip=0.5),
    "greedy extra": partial(Greedy, extra=EXTRA, accumulate=3),
    "backprop windows of 3": partial(Backprop, accumulate=3),
    "backlink 1": partial(BackLink, reach=1, accumulate=2),
    "backlink 1 sync": partial(BackLink, reach=1, check="sync"),
    "backlink 1 extra": partial(BackLink, reach=1, extra=EXTRA),
    "backlink 2": partial(BackLink, reach=2),
    "backlink 2 windows of 3": partial(BackLink, reach=2, accumulate=3, extra=EXTRA[2:]),
    "replay": partial(Replay, capacity=3),
    "replay noise": partial(Replay, **BUSY),
    "replay max uses": partial(Replay, **BUSY, max_uses=1),
    "replay noise sync, windows of 2": partial(Replay, **BUSY, check="sync", accumulate=2, buffer_device="cpu"),
    "replay fp16": partial(Replay, **BUSY, codec="fp16"),
    "replay bf16": partial(Replay, **BUSY, codec="bf16", max_uses=2),
    "replay int8": partial(Replay, **BUSY, codec="int8"),
    "replay vq": partial(Replay, **BUSY, codec="vq"),
    "replay small vq": partial(Replay, **BUSY, codec=VectorQuantizer(codes=4, group=2, patience=2)),
    "replay extra": partial(Replay, **BUSY, extra=EXTRA),
    "stashed": partial(Delayed, weights="stashed"),
    "stashed sync": partial(Delayed, weights="stashed", check="sync", clip=0.5),
    "stashed windows of 2": partial(Delayed, weights="stashed", accumulate=2),
    "current": partial(Delayed, weights="current"),
    "current sync, windows of 3": partial(Delayed, weights="current", check="sync", accumulate=3),
}
IN_HALF = {
    f"{name} in half": partial(SCHEDULES[name], **HALF) for name in ("greedy", "backlink 1", "stashed", "current")
}
IN_HALF["replay in half"] = partial(Replay, **BUSY, **HALF)


@functools.cache
def _deep():
    return make_net(Chain(depth=9, drop=0.3), cuts=["stages.1", "stages.4", "stages.6"], drop=0.3)


def fresh(name):
    """Return a net with BatchNorm and dropout; links of two base layers need blocks of two."""
    if "backlink 2" in name:
        return copy.deepcopy(_deep())
    return make_net(drop=0.3, dtype=torch.float32 if name in IN_HALF else torch.float64)


def data(name):
    dtype = torch.float32 if name in IN_HALF else torch.float64
    pairs = batches(TOTAL, dtype=dtype)
    pairs[3] = batch(5, seed=77, dtype=dtype)  # of another size
    return pairs


def train(schedule, pairs):
    """Train; the draws of the global stream, which only Backprop takes, are those of the step."""
    results = []
    for x, y in pairs:
        if isinstance(schedule, Backprop):
            torch.manual_seed(schedule.net.steps)
        results.append(schedule.step(x, y))
    return [(result.losses, result.output) for result in results]


def everything(schedule):
    return {"net": dict(schedule.net.state_dict()), "schedule": schedule.state_dict()}


def start(name, optimizer=sgd):
    """Return a schedule of a fresh net; weights of extra losses are drawn from the global stream."""
    torch.manual_seed(0)
    return {**SCHEDULES, **IN_HALF}[name](fresh(name), optimizer)


CASES = [(name, sgd) for name in [*SCHEDULES, *IN_HALF]]
CASES += [(name, adam) for name in ("greedy", "replay noise", "stashed", "current")]


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_stopped_after_any_step(name, optimizer, tmp_path):
    pairs = data(name)
    straight, stopping = start(name, optimizer), start(name, optimizer)
    expected = train(straight, pairs)
    for stop in range(1, 7):
        train(stopping, pairs[stop - 1 : stop])
        assert stopping.net.steps == stop
        torch.save([stopping.net.state_dict(), stopping.state_dict()], tmp_path / f"{stop}.pt")
    for stop in range(1, 7):
        again = start(name, optimizer)
        for module in getattr(again, "extras", []):
            for p in module.parameters():
                nn.init.zeros_(p)  # the state brings its own
        net, state = torch.load(tmp_path / f"{stop}.pt", weights_only=True)
        again.net.load_state_dict(net)
        again.load_state_dict(state)
        disturb()
        assert_equal(train(again, pairs[stop:]), expected[stop:], f"after {stop}: results")
        assert_equal(everything(again), everything(straight), f"after {stop}")
    train(stopping, pairs[6:])
    assert_equal(everything(stopping), everything(straight), "to look at the state changes nothing")


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [(Backprop, ["stages.0", "stages.1", "stages.2"]), (Backprop, []), (Greedy, []), (Delayed, [])],
    ids=["backprop", "backprop, one block", "greedy, one block", "delayed, one block"],
)
def test_draws_of_the_global_stream_go_on_too(kind, cuts, tmp_path):
    """Backpropagation draws as the plain model does: where the stream stands belongs to its state."""

    def begin():
        return kind(make_net(cuts=cuts, drop=0.5), sgd)

    straight, pairs = begin(), batches(6)
    torch.manual_seed(3)
    results = [straight.step(x, y) for x, y in pairs[:3]]
    torch.save([straight.net.state_dict(), straight.state_dict()], tmp_path / "s.pt")
    results += [straight.step(x, y) for x, y in pairs[3:]]
    disturb()
    again = begin()
    net, state = torch.load(tmp_path / "s.pt", weights_only=True)
    again.net.load_state_dict(net)
    again.load_state_dict(state)
    assert_equal([again.step(x, y).losses for x, y in pairs[3:]], [r.losses for r in results[3:]])
    assert_equal(dict(again.net.state_dict()), dict(straight.net.state_dict()))


def test_what_replay_counts_goes_on_too(tmp_path):
    """And the tests above mean something: workers did skip, batches were left out, codecs did change the numbers."""
    schedule, again = start("replay max uses"), start("replay max uses")
    train(schedule, data("")[:7])
    torch.save(schedule.state_dict(), tmp_path / "s.pt")
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert again.report() == schedule.report()
    assert (again.counts.not_stored, sum(again.counts.skipped) > 3) == (1, True)
    finals = []
    for name in ("replay noise", "replay fp16", "replay int8", "replay small vq"):
        schedule = start(name)
        train(schedule, data(name))
        finals.append(schedule.net.model.out.weight)
    assert not any(torch.equal(a, b) for k, a in enumerate(finals) for b in finals[:k])


class Own:
    """A codec of one's own, as the protocol asks for it."""

    overhead_bytes = 0

    def encode(self, tensor):
        return {"half": tensor.bfloat16()}

    def decode(self, encoded):
        return encoded["half"].double()

    def fresh(self):
        return Own()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


def test_a_codec_of_ones_own_goes_on_in_another_process():
    schedule, again = (Replay(fresh(""), sgd, capacity=2, codec=Own()) for _ in range(2))
    train(schedule, data("")[:3])
    again.load_state_dict(schedule.state_dict())


# ---- through fit ----------------------------------------------------------------------------------------------------

FITTED = [
    *("greedy extra", "backlink 1", "replay max uses", "replay small vq", "replay noise sync, windows of 2"),
    *("stashed", "stashed windows of 2", "current", "current sync, windows of 3"),
]


@pytest.mark.parametrize("name", FITTED)
def test_fit_that_was_killed(name, tmp_path):
    loader = LOADERS["shuffled"]

    def kind(net, optimizer):
        torch.manual_seed(0)
        return SCHEDULES[name](net, optimizer)

    assert_killed_runs_agree(loader, kind, (1, 3, 6), tmp_path)


# ---- states that do not fit -----------------------------------------------------------------------------------------


def refused(schedule, state, match):
    """Assert that a state is refused with a text, and that nothing of it was loaded."""
    train(schedule, batches(2))
    before = copy.deepcopy(everything(schedule))
    with pytest.raises(CheckpointError, match=match):
        schedule.load_state_dict(state)
    assert_equal(everything(schedule), before, "what was there")
    train(schedule, batches(1))


@pytest.mark.parametrize("theirs", ALL)
@pytest.mark.parametrize("ours", ALL)
def test_states_of_other_schedules(ours, theirs):
    one, other = (ALL[kind](make_net(), sgd) for kind in (ours, theirs))
    train(other, batches(3))
    names = [type(other).__name__, type(one).__name__]
    if ours == theirs:
        one.load_state_dict(other.state_dict())
    elif names == ["Delayed", "Delayed"]:
        refused(one, other.state_dict(), f"options.*'weights': '{theirs}'.*here it is.*'weights': '{ours}'")
    else:
        refused(one, other.state_dict(), f"its schedule is '{names[0]}', here it is '{names[1]}'")


OTHER_OPTIONS = [
    (partial(Greedy, accumulate=2), Greedy, "'accumulate': 2"),
    (partial(Greedy, autocast=torch.bfloat16), Greedy, "'autocast': 'torch.bfloat16'"),
    (partial(Greedy, extra=[PredSim(0.5)]), Greedy, r"PredSim\(weight=0.5"),
    (partial(Greedy, extra=[PredSim(0.5)]), partial(Greedy, extra=[PredSim(0.25)]), r"PredSim\(weight=0.25"),
    (partial(BackLink, reach=1), partial(BackLink, reach=0), "'reach': 1.*'reach': 0"),
    (partial(Replay, capacity=2), partial(Replay, capacity=3), "'capacity': 2.*'capacity': 3"),
    (partial(Replay, capacity=2, max_uses=1), partial(Replay, capacity=2), "'max_uses': 1.*'max_uses': None"),
    (partial(Replay, capacity=2, noise=0.5), partial(Replay, capacity=2), r"'noise': \[0.5"),
    (partial(Replay, capacity=2, codec="int8"), partial(Replay, capacity=2, codec="fp16"), "codec.*codec"),
    (partial(Replay, capacity=2, codec="vq"), partial(Replay, capacity=2, codec=VectorQuantizer(group=2)), "group=2"),
]


@pytest.mark.parametrize(("theirs", "ours", "match"), OTHER_OPTIONS, ids=[match for *_, match in OTHER_OPTIONS])
def test_states_of_other_options(theirs, ours, match):
    dtype = torch.float32 if "bfloat" in match else torch.float64
    other = theirs(make_net(dtype=dtype), sgd)
    train(other, batches(3, dtype=dtype))
    refused(ours(make_net(), sgd), other.state_dict(), f"options is .*{match}.*with the options that it was written")


@pytest.mark.parametrize("kind", ALL)
def test_states_of_other_plans_optimizers_and_trained_parameters(kind):
    other = ALL[kind](make_net(), sgd)
    train(other, batches(3))
    state = other.state_dict()
    plan = ALL[kind](make_net(cuts=["stages.0", "stages.2"]), sgd)
    refused(plan, state, r"its cuts is \['stages.0', 'stages.1', 'stages.2'\], here it is \['stages.0', 'stages.2'\]")
    refused(ALL[kind](make_net(), adam), state, r"optimizer types is \['SGD'.*'AdamW'")
    frozen = make_net()
    frozen.model.stages[1][0].weight.requires_grad_(False)
    refused(ALL[kind](frozen, sgd), state, "optimizer shapes.*same parameters frozen")


@pytest.mark.parametrize("kind", ALL)
def test_states_with_a_part_missing(kind):
    schedule = ALL[kind](make_net(), sgd)
    train(schedule, batches(5))
    state = schedule.state_dict()
    for part in state:
        fresh = ALL[kind](make_net(), sgd)
        refused(fresh, {name: value for name, value in state.items() if name != part}, None)
