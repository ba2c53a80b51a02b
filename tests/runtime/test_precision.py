"""Mixed precision: forward under autocast, backward outside of it, and with float16 a scaler a block."""

import pytest
import torch
import torch.nn.functional as F
from kinds import ALL, HEADED, changed, copies, trained
from small import Bare, batches, by_hand, make_net, make_tied, same, sgd
from torch import nn

from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, block_seed

LOW = [torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize("kind", ALL)
every_dtype = pytest.mark.parametrize("low", LOW, ids=["bfloat16", "float16"])


def single(**options):
    return make_net(dtype=torch.float32, **options)


def data(count):
    return batches(count, dtype=torch.float32)


def train(schedule, steps, start=0):
    """Train on the batches `start` to `steps`; draws of the global stream are the same every time."""
    torch.manual_seed(1)
    return [schedule.step(x, y) for x, y in data(steps)[start:]]


@every_dtype
@every_kind
def test_forward_runs_in_the_low_dtype_and_backward_outside_of_autocast(kind, low):
    net = single(drop=0.3)
    ran, walked = [], []

    def record(_module, _args, out):
        ran.append((out.dtype, torch.is_autocast_enabled("cpu")))
        if out.requires_grad:
            out.register_hook(lambda g: walked.append((g.dtype, torch.is_autocast_enabled("cpu"))))

    for layer in [stage[0] for stage in net.model.stages] + [net.model.out]:
        layer.register_forward_hook(record)
    before = copies(net)
    results = train(ALL[kind](net, sgd, autocast=low), 5)
    assert set(ran) == {(low, True)}
    assert set(walked) == {(low, False)}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {loss.dtype for result in results for loss in result.losses} == {torch.float32}
    assert {result.output.dtype for result in results} == {low}
    assert changed(net, before) == trained(kind, net)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("drop", [0.0, 0.3])
@every_kind
def test_the_users_own_region_over_many_steps_does_the_same(kind, drop):
    """Autocast caches the weights that it casts; those of the step before must not be used again."""
    net, other = single(drop=drop), single(drop=drop)
    train(ALL[kind](net, sgd, autocast=torch.bfloat16), 6)
    with torch.autocast("cpu", torch.bfloat16):
        train(ALL[kind](other, sgd), 6)
    same(net, other)


@every_dtype
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_greedy_equals_a_loop_by_hand(drop, low):
    net = single(drop=drop)
    model, heads, parts = by_hand(net)
    optimizers = [sgd([*stage.parameters(), *head.parameters()]) for stage, head in parts]
    scalers = [torch.amp.GradScaler("cpu", enabled=low is torch.float16) for _ in parts]
    losses = [loss for result in train(Greedy(net, sgd, autocast=low, clip=0.5), 6) for loss in result.losses]
    expected = []
    for step, (x, y) in enumerate(data(6)):
        h = x
        for k, (stage, head) in enumerate(parts):
            torch.manual_seed(block_seed(0, k, step))
            with torch.autocast("cpu", low):
                h = stage(h.detach())
                expected.append(F.cross_entropy(head(h), y))
            optimizers[k].zero_grad()
            scalers[k].scale(expected[-1]).backward()
            scalers[k].unscale_(optimizers[k])
            nn.utils.clip_grad_norm_([*stage.parameters(), *head.parameters()], 0.5)
            scalers[k].step(optimizers[k])
            scalers[k].update()
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    same(net.model, model)
    same(net.heads, heads)


@every_dtype
def test_backprop_equals_a_loop_by_hand(low):
    net = single(drop=0.3)
    model, _, _ = by_hand(net)
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", enabled=low is torch.float16)
    train(Backprop(net, sgd, autocast=low), 6)
    torch.manual_seed(1)
    for x, y in data(6):
        with torch.autocast("cpu", low):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    same(net.model, model)


# ---- float16: scalers -----------------------------------------------------------------------------------------------


def scales(schedule):
    return [scaler.get_scale() for scaler in schedule.scalers]


def with_scales(schedule, *given):
    """Give every block a scale to start from; at the default of 65536 some of these small blocks do overflow."""
    schedule.scalers[:] = [torch.amp.GradScaler("cpu", init_scale=2.0**k) for k in given]
    return schedule


@every_kind
def test_an_overflow_skips_one_block_and_halves_its_scale_alone(kind):
    net = single()
    schedule = ALL[kind](net, sgd, autocast=torch.float16)
    if kind != "backprop":
        with_scales(schedule, 8, 8, 8, 8)
    train(schedule, 4)
    start, before = scales(schedule), copies(net)
    state = {id(p): s["momentum_buffer"].clone() for p, s in schedule.optimizers[2].state.items()}
    hook = net.model.stages[2][0].weight.register_hook(lambda g: g * float("inf"))
    train(schedule, 5, 4)
    hook.remove()
    theirs = {name for name in before if name.startswith(("model.stages.2", "heads.2"))}
    assert changed(net, before) == trained(kind, net) - theirs
    for p, s in schedule.optimizers[2].state.items():
        assert torch.equal(s["momentum_buffer"], state[id(p)])
    factors = [0.5] * 4 if kind == "backprop" else [1, 1, 0.5, 1]
    assert scales(schedule) == [a * b for a, b in zip(start, factors, strict=True)]
    train(schedule, 7, 5)
    assert changed(net, before) == trained(kind, net)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", ["greedy", "replay"])
def test_too_large_a_scale_is_the_business_of_its_block(kind):
    net = single()
    schedule = with_scales(HEADED[kind](net, sgd, autocast=torch.float16), 8, 40, 8, 8)
    before = copies(net)
    train(schedule, 1)
    theirs = {name for name in before if name.startswith(("model.stages.1", "heads.1"))}
    assert changed(net, before) == trained(kind, net) - theirs
    assert scales(schedule) == [2.0**8, 2.0**39, 2.0**8, 2.0**8]


@pytest.mark.parametrize("kind", ["backlink", "stashed", "current"])
@pytest.mark.parametrize("block", [1, 3])
def test_too_large_a_scale_goes_down_until_all_blocks_train(kind, block):
    """The gradient that leaves the block is infinite, too, and makes the blocks below wait."""
    net = single()
    schedule = with_scales(ALL[kind](net, sgd, autocast=torch.float16), *[24 if k == block else 8 for k in range(4)])
    train(schedule, 30)
    before = copies(net)
    train(schedule, 32, 30)
    assert all(p.isfinite().all() for p in net.parameters())
    assert changed(net, before) == trained(kind, net)
    assert 0.5 <= min(scales(schedule)) <= max(scales(schedule)) < 2.0**24


def test_scales_are_part_of_the_state():
    schedule, again = (Greedy(single(), sgd, autocast=torch.float16) for _ in range(2))
    train(with_scales(schedule, 8, 40, 9, 10), 3)
    state = schedule.state_dict()
    assert [one["scale"] for one in state["scalers"]] == [2.0**8, 2.0**37, 2.0**9, 2.0**10]
    assert [one["_growth_tracker"] for one in state["scalers"]] == [3, 0, 3, 3]
    again.load_state_dict(state)
    assert scales(again) == scales(schedule)
    assert Greedy(single(), sgd, autocast=torch.bfloat16).state_dict()["scalers"] is None


@pytest.mark.parametrize("kind", [Greedy, BackLink, lambda *a, **k: Delayed(*a, weights="current", **k)])
def test_blocks_that_share_a_parameter_share_a_scaler(kind):
    net, reference = make_tied(dtype=torch.float32), make_tied(dtype=torch.float32)
    schedule = kind(net, sgd, autocast=torch.float16, clip=0.5)
    assert len({id(scaler) for scaler in schedule.scalers}) == 1
    train(schedule, 6)
    train(kind(reference, sgd, clip=0.5), 6)
    same(net, reference, 1e-2)
    assert scales(schedule) == [2.0**16] * 4
    hook = net.model.stages[3].weight.register_hook(lambda g: g * float("inf"))
    train(schedule, 7, 6)
    hook.remove()
    assert scales(schedule) == [2.0**15] * 4
    assert net.model.stages[3].weight.isfinite().all()


def test_backprop_has_one_scaler():
    assert len({id(scaler) for scaler in Backprop(single(), sgd, autocast=torch.float16).scalers}) == 1


@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("kind", ["backlink", "stashed", "current"])
def test_gradients_cross_between_blocks_in_true_units(kind, options):
    """Neighbours of very different scales: 12 steps stay as near to float32 as with equal ones."""
    net, reference = (make_net(Bare, heads="linear", dtype=torch.float32) for _ in range(2))
    schedule = with_scales(ALL[kind](net, sgd, autocast=torch.float16, **options), 3, 14, 6, 11)
    start = copies(net)
    train(schedule, 12)
    train(ALL[kind](reference, sgd, **options), 12)
    for name in trained(kind, net):
        wanted = reference.get_parameter(name) - start[name]
        found = net.get_parameter(name) - start[name]
        assert (found - wanted).norm() <= 0.02 * wanted.norm(), name
    assert scales(schedule) == [2.0**3, 2.0**14, 2.0**6, 2.0**11]


@pytest.mark.parametrize("kind", ["backlink", "stashed", "current"])
def test_a_frozen_block_does_not_keep_too_large_a_scale(kind):
    """Its gradients are scaled for the sake of the block below, which waits for finite ones."""
    net = single()
    for p in net.blocks[3].parameters():
        p.requires_grad_(False)
    net.engine.loss = lambda output, target: 1e4 * F.cross_entropy(output, target)  # too much for a scale of 65536
    schedule = ALL[kind](net, sgd, autocast=torch.float16, clip=0.1)
    train(schedule, 40)
    before = copies(net)
    train(schedule, 42, 40)
    assert changed(net, before) == trained(kind, net)


@pytest.mark.parametrize("check", ["async", "sync"])
@every_kind
def test_training_goes_on_after_a_loss_that_is_not_finite(kind, check):
    net = single()
    schedule = ALL[kind](net, sgd, autocast=torch.float16, **({} if kind == "backprop" else {"check": check}))
    train(schedule, 4)
    calls, heads = [], 4 if kind in HEADED else 1

    def fails_once(output, target):
        calls.append(1)
        return F.cross_entropy(output, target) * (float("nan") if len(calls) == min(3, heads) else 1.0)

    net.engine.loss = fails_once
    with pytest.raises(NonFiniteLossError):
        train(schedule, 5, 4)
    before = copies(net)
    train(schedule, 10, 5)
    assert changed(net, before) == trained(kind, net)
    assert all(p.isfinite().all() for p in net.parameters())


def test_other_dtypes_are_refused():
    with pytest.raises(ScheduleError, match=r"autocast=torch.float32: give torch.bfloat16, torch.float16, or None"):
        Greedy(single(), sgd, autocast=torch.float32)
