"""Windows of accumulation, learning rates of each block, frozen parameters, losses of other kinds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kinds import ALL, HEADED, FailsAt, changed, copies, trained
from small import Bare, batches, by_hand, make_net, same, sgd
from torch import nn
from torch.optim import lr_scheduler

from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, fit

every_kind = pytest.mark.parametrize("kind", ALL)


def micro(windows, count=4, size=2):
    """Return `count` small batches for each of the windows, and the whole ones they are parts of."""
    whole = batches(windows, size=count * size)
    small = [part for x, y in whole for part in zip(x.split(size), y.split(size), strict=True)]
    return small, whole


def bare(**options):
    return make_net(Bare, heads="linear", **options)


def features_replay(net, data, window, restarts=(), clip=None):
    """Train the blocks of a `Chain` by Features Replay, by hand; windows begin anew in front of calls `restarts`."""
    model, _, _ = by_hand(net)
    blocks = [*model.stages[:3], nn.Sequential(model.stages[3], model.out)]
    owned = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    optimizers = [sgd(params) if params else None for params in owned]
    inputs, gradients, calls = {}, {}, 0
    for t, (x, y) in enumerate(data):
        if t in restarts:
            model.zero_grad()
            calls = 0
        h = x
        for k, block in enumerate(blocks):
            inputs[k, t] = h
            with torch.no_grad():
                h = block(h)
        for k, block in enumerate(blocks):
            s = t - (3 - k)
            if s < 0:
                continue
            leaf = inputs[k, s].clone().requires_grad_()
            out = block(leaf)
            if k == 3:
                F.cross_entropy(out, y).div(window).backward()
            else:
                out.backward(gradients[k + 1, s])
            gradients[k, s] = leaf.grad
        calls += 1
        if calls % window == 0:
            for params, optimizer in zip(owned, optimizers, strict=True):
                if any(p.grad is not None for p in params):
                    if clip is not None:
                        nn.utils.clip_grad_norm_(params, clip)
                    optimizer.step()
            model.zero_grad()
    return model


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    "kind",
    [Backprop, Greedy, lambda *a, **k: Greedy(*a, check="sync", **k), BackLink],
    ids=["backprop", "greedy", "sync", "link"],
)
def test_four_small_batches_equal_one_large_one(kind, clip):
    one, other = bare(), bare()
    small, whole = micro(5)
    schedule, plain = kind(one, sgd, accumulate=4, clip=clip), kind(other, sgd, clip=clip)
    for w, (x, y) in enumerate(whole):
        expected = plain.step(x, y).losses
        losses = [schedule.step(*pair).losses for pair in small[4 * w : 4 * w + 4]]
        torch.testing.assert_close([sum(column) / 4 for column in zip(*losses, strict=True)], expected)
        same(one, other, 1e-12)
    assert (one.steps, other.steps) == (20, 5)


def test_four_small_batches_equal_a_plain_loop():
    net = bare()
    model, _, _ = by_hand(net)
    optimizer = sgd(model.parameters())
    small, whole = micro(5)
    schedule = Backprop(net, sgd, accumulate=4)
    for x, y in small:
        schedule.step(x, y)
    for x, y in whole:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    same(net.model, model, 1e-12)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_features_replay_in_windows_equals_a_loop_by_hand(clip):
    net = make_net(norm=False)
    data = batches(16, size=3)
    model = features_replay(net, data, 4, clip=clip)
    schedule = Delayed(net, sgd, weights="current", accumulate=4, clip=clip)
    for x, y in data:
        schedule.step(x, y)
    same(net.model, model, 1e-12)


@every_kind
def test_clipping_is_done_once_a_window(kind, monkeypatch):
    clipped, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda ps, norm: (clipped.append(len(ps)), clip(ps, norm))[1])
    net = make_net()
    schedule = ALL[kind](net, sgd, clip=0.1, accumulate=3)
    for x, y in batches(9):
        schedule.step(x, y)
    sizes = [len(parameters) for parameters in schedule.parameters]
    # In the first window, the batch that block 0 is to walk back has not come up to the end yet, when blocks are late.
    first = sizes[1:] if kind in ("stashed", "current") else sizes
    assert sorted(clipped) == sorted(first + 2 * sizes)


@every_kind
def test_nothing_changes_before_the_window_ends(kind):
    net = make_net()
    schedule = ALL[kind](net, sgd, accumulate=3)
    before = copies(net)
    for call, (x, y) in enumerate(batches(9)):
        schedule.step(x, y)
        assert bool(changed(net, before)) == (call % 3 == 2)
        before = copies(net)
    assert all(p.grad is None for p in net.heads.parameters())


@every_kind
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_state_from_the_middle_of_a_window(kind, stop, tmp_path):
    data = batches(9)
    straight, first, second = (make_net() for _ in range(3))
    schedule = ALL[kind](straight, sgd, accumulate=3)
    for x, y in data:
        schedule.step(x, y)
    schedule = ALL[kind](first, sgd, accumulate=3)
    for x, y in data[:stop]:
        schedule.step(x, y)
    torch.save((first.state_dict(), schedule.state_dict()), tmp_path / "s.pt")
    again = ALL[kind](second, sgd, accumulate=3)
    state, saved = torch.load(tmp_path / "s.pt", weights_only=True)
    assert any(g is not None for gradients in saved["gradients"] for g in gradients)
    second.load_state_dict(state)
    again.load_state_dict(saved)
    for x, y in data[stop:]:
        again.step(x, y)
    same(second, straight)


@every_kind
@pytest.mark.parametrize("good", [1, 2])
def test_a_step_that_raises_begins_a_new_window(kind, good):
    net = make_net()
    schedule = ALL[kind](net, sgd, accumulate=3)
    data = batches(9 + good)
    for x, y in data[:6]:  # late blocks have begun
        schedule.step(x, y)
    losses = 4 if kind in HEADED else 1
    net.engine.loss = FailsAt(good * losses + losses // 2)
    for x, y in data[6 : 6 + good]:
        schedule.step(x, y)
    with pytest.raises(NonFiniteLossError):
        schedule.step(*data[6 + good])
    before = copies(net)
    if good == 1:
        for x, y in data[:2]:
            schedule.step(x, y)
            assert not changed(net, before)
        schedule.step(*data[2])
    else:  # the window ended with the step that raised: blocks that had their turn before it may have stepped
        for x, y in data[:3]:
            schedule.step(x, y)
    assert changed(net, before) == trained(kind, net)
    assert schedule.state_dict()["calls"] == 0


@pytest.mark.parametrize("kind", ["backprop", "greedy", "backlink"])
def test_nothing_of_the_window_that_failed_is_left(kind):
    one, other = bare(), bare()
    schedule, plain = (ALL[kind](net, sgd, accumulate=3) for net in (one, other))
    data = batches(6)
    one.engine.loss = FailsAt(6 if kind in HEADED else 1)
    schedule.step(*data[0])
    with pytest.raises(NonFiniteLossError):
        schedule.step(*data[1])
    for x, y in data[2:5]:
        schedule.step(x, y)
        plain.step(x, y)
    same(one, other)


def test_features_replay_after_a_step_that_raised():
    """The batch is as if it had never been; those before it still come back, in the next window."""
    net = make_net(norm=False)
    data = batches(13)
    model = features_replay(net, data, 3, restarts=[4])
    schedule = Delayed(net, sgd, weights="current", accumulate=3)
    for t, (x, y) in enumerate(data):
        if t == 4:
            net.engine.loss = FailsAt(0)
            with pytest.raises(NonFiniteLossError):
                schedule.step(*batches(20)[19])
        schedule.step(x, y)
    same(net.model, model, 1e-12)


# ---- learning rates, frozen parameters, losses ----------------------------------------------------------------------


@pytest.mark.parametrize("interval", ["epoch", "step"])
@every_kind
def test_a_list_of_learning_rate_schedulers(kind, interval):
    net = make_net()
    schedule = ALL[kind](net, sgd)
    factories = [
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5),
        None,
        lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.1),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: n),
    ]
    how = {"epochs": 2, "schedule": schedule, "lr_interval": interval, "progress": False}
    fit(net, batches(2), lr_scheduler=factories, **how)
    n = 2 if interval == "epoch" else 4
    rates = [optimizer.param_groups[0]["lr"] for optimizer in schedule.optimizers]
    assert rates == pytest.approx([0.1 * 0.5**n, 0.1, 0.1 * 0.1 ** (n // 3), 0.1 * n])
    with pytest.raises(ScheduleError, match="lists 3 factories; the net has 4 blocks"):
        fit(net, batches(2), lr_scheduler=factories[:3], **how)


@every_kind
@pytest.mark.parametrize("frozen", [("0",), ("1",), ("3",), ("0", "1"), ("2", "3"), ("weights",)], ids="+".join)
def test_frozen_parameters_stay_and_the_others_train(kind, frozen):
    net = make_net(drop=0.2)
    some = {"model.stages.1.0.weight", "model.stages.0.1.bias", "heads.2.0.weight", "model.out.bias"}
    whole = [p for k in frozen if k != "weights" for p in net.blocks[int(k)].parameters()]
    for p in whole or map(net.get_parameter, some):
        p.requires_grad_(False)
    schedule = ALL[kind](net, sgd, clip=0.5, accumulate=2)
    assert [optimizer is None for optimizer in schedule.optimizers] == [str(k) in frozen for k in range(4)]
    rates = [lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5)] * 4
    before = copies(net)
    fit(net, batches(8), epochs=1, schedule=schedule, lr_scheduler=rates, progress=False)
    assert changed(net, before) == trained(kind, net)
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    again = ALL[kind](net, sgd, clip=0.5, accumulate=2)
    again.load_state_dict(schedule.state_dict())


@pytest.mark.parametrize("frozen", [[0], [1], [2, 1], [3]], ids=str)
def test_late_gradients_pass_through_frozen_blocks(frozen):
    net = make_net(norm=False)
    for k in frozen:
        for p in net.blocks[k].parameters():
            p.requires_grad_(False)
    data = batches(8)
    model = features_replay(net, data, 1)
    schedule = Delayed(net, sgd, weights="current")
    for x, y in data:
        schedule.step(x, y)
    same(net.model, model, 1e-12)


@pytest.fixture(scope="module")
def smooth():
    """A net with a loss that smooths labels."""
    return make_net(loss=nn.CrossEntropyLoss(label_smoothing=0.1))


@every_kind
def test_label_smoothing(kind, smooth):
    net = copy.deepcopy(smooth)
    (x, y), *rest = batches(6)
    _, _, parts = by_hand(net)
    h, expected = x, []
    for stage, head in parts:
        h = stage(h)
        one_hot = F.one_hot(y, 3).double() * 0.9 + 0.1 / 3
        expected.append(-(one_hot * torch.log_softmax(head(h), 1)).sum(1).mean().detach())
    schedule = ALL[kind](net, sgd)
    losses = schedule.step(x, y).losses
    torch.testing.assert_close(losses, expected if kind in HEADED else expected[3:], rtol=1e-12, atol=0)
    before = copies(net)
    for x, y in rest:
        schedule.step(x, y)
    assert changed(net, before) == trained(kind, net)
