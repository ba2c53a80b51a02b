"""A finite loss with a gradient that is not finite: nobody steps with it, and the block keeps what it has."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from kinds import ALL, HEADED, changed, copies, trained
from resuming import assert_equal
from small import batch, batches, by_hand, make_net, same, sgd
from torch import nn

import sedona_fx
from sedona_fx.errors import NonFiniteGradientError, NonFiniteLossError, SedonaError
from sedona_fx.runtime.gradients import first_not_finite, not_finite, trained_in
from sedona_fx.runtime.guard import FiniteGuard
from sedona_fx.train import Backprop, Greedy, block_seed

every_kind = pytest.mark.parametrize("kind", ALL)
every_check = pytest.mark.parametrize("check", ["async", "sync"])
every_path = pytest.mark.parametrize("deferred", [None, True], ids=["host", "device"])
OPTIMIZERS = {
    "sgd": sgd,
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
}


def train(schedule, pairs):
    for x, y in pairs:
        schedule.step(x, y)


def poison(net, block, value=math.nan):
    """Make the gradient of one weight of a block not finite; return what takes it back."""
    return net.model.stages[block][0].weight.register_hook(lambda gradient: gradient * value)


def state_of(schedule, block):
    part = schedule.net.blocks[block]
    tensors = [*part.parameters(), *part.buffers()]
    return copy.deepcopy([[t.detach() for t in tensors], schedule.optimizers[block].state_dict()["state"]])


def kept(schedule, before):
    """Return the blocks whose parameters, buffers and optimizer state are as before."""
    found = set()
    for block, state in enumerate(before):
        try:
            assert_equal(state_of(schedule, block), state)
            found.add(block)
        except AssertionError:
            pass
    return found


@every_path
@every_check
@every_kind
@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_block_keeps_what_it_has_and_training_goes_on(kind, block, check, deferred, optimizer):
    net = make_net(drop=0.2)
    net.engine.guard = FiniteGuard(deferred)
    schedule = ALL[kind](net, optimizer, **({} if kind == "backprop" else {"check": check}))
    data = batches(16)
    train(schedule, data[:5])
    before = [state_of(schedule, k) for k in range(4)]
    hook = poison(net, block)
    late = deferred and (kind == "backprop" or check == "async")
    if late:
        schedule.step(*data[5])
    after = kept(schedule, before)
    with pytest.raises(NonFiniteGradientError) as caught:
        schedule.step(*data[5])
    hook.remove()
    if late:
        assert block in after
        assert kept(schedule, before) == after, "the step that raises late does nothing else"
    assert block in kept(schedule, before)
    if kind == "backprop" or (check == "sync" and kind in HEADED):
        assert kept(schedule, before) == {0, 1, 2, 3}
    elif check == "async" and kind in HEADED and block > 1:
        assert 0 not in kept(schedule, before)
    assert (caught.value.block, caught.value.step) == (block, 5)
    assert block in caught.value.blocks
    assert f"gradient of block {block} is " in str(caught.value)
    assert f"of block {block} keep their values from before this step" in str(caught.value)
    if not late:
        assert caught.value.parameter == f"stages.{block}.0.weight"
        assert math.isnan(caught.value.value)
    parameters = copies(net)
    train(schedule, data[6:])
    schedule.raise_pending()
    assert changed(net, parameters) == trained(kind, net)
    assert all(t.isfinite().all() for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("block", range(4))
def test_greedy_is_a_loop_by_hand_that_leaves_out_the_step(block):
    """Blocks before the bad one step; it keeps its statistics, too; those behind it do not run."""
    net = make_net(drop=0.3)
    model, heads, parts = by_hand(net)
    optimizers = [sgd([*stage.parameters(), *head.parameters()]) for stage, head in parts]
    schedule = Greedy(net, sgd)
    step = 0
    for number, (x, y) in enumerate(batches(6)):
        if number == 2:
            hook = poison(net, block, math.inf)
            with pytest.raises(NonFiniteGradientError, match=rf"block {block} is -?inf at step 2"):
                schedule.step(x, y)
            hook.remove()
        else:
            schedule.step(x, y)
        h = x
        for k, (stage, head) in enumerate(parts[:block] if number == 2 else parts):
            torch.manual_seed(block_seed(0, k, step))
            h = stage(h.detach())
            optimizers[k].zero_grad()
            F.cross_entropy(head(h), y).backward()
            optimizers[k].step()
        step += number != 2
    same(net.model, model)
    same(net.heads, heads)


def nan_at_zero(output, target):
    return F.cross_entropy(output, target) + (output * 0).abs().sum().sqrt()


@every_path
@every_kind
def test_a_root_at_zero_in_the_loss(kind, deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    net.engine.loss = nan_at_zero
    schedule, before = ALL[kind](net, sgd), copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteGradientError):
        train(schedule, batches(6))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name


def test_backprop_names_the_block_that_is_nearest_to_the_loss():
    for deferred in (None, True):
        net = make_net()
        net.engine.guard = FiniteGuard(deferred)
        net.engine.loss = nan_at_zero
        schedule = Backprop(net, sgd)
        with pytest.raises(NonFiniteGradientError) as caught:
            train(schedule, batches(2))
        assert caught.value.block == 3
        assert sorted(caught.value.blocks) == [0, 1, 2, 3]


# ---- what becomes infinite on the way -------------------------------------------------------------------------------


@every_path
@every_kind
def test_gradients_that_overflow_as_they_add_up(kind, deferred):
    net = make_net(dtype=torch.float32)
    net.engine.guard = FiniteGuard(deferred)
    schedule = ALL[kind](net, sgd, accumulate=2)
    data = batches(12, dtype=torch.float32)
    train(schedule, data[:8])
    before = copies(net)
    hook = net.model.stages[1][0].weight.register_hook(lambda g: torch.full_like(g, 2e38))
    with pytest.raises(NonFiniteGradientError, match="block 1"):
        train(schedule, [*data[8:10], data[0]])
    hook.remove()
    assert "model.stages.1.0.weight" not in changed(net, before)


@every_path
def test_gradients_that_overflow_as_they_are_unscaled(deferred):
    """A scaler looks at them before that, and would step."""
    net = make_net(dtype=torch.float32)
    net.engine.guard = FiniteGuard(deferred)
    schedule = Greedy(net, sgd, autocast=torch.float16)
    schedule.scalers[:] = [torch.amp.GradScaler("cpu", init_scale=2.0**-30) for _ in range(4)]
    data = batches(3, dtype=torch.float32)
    schedule.step(*data[0])
    hook = net.model.stages[1][0].weight.register_hook(lambda g: torch.full_like(g, 1e30))
    before = copies(net)
    with pytest.raises(NonFiniteGradientError, match="block 1"):
        train(schedule, data[1:])
    hook.remove()
    assert "model.stages.1.0.weight" not in changed(net, before)


@every_path
@every_kind
def test_with_a_scaler_an_overflow_is_skipped_as_ever(kind, deferred):
    net = make_net(dtype=torch.float32)
    net.engine.guard = FiniteGuard(deferred)
    schedule = ALL[kind](net, sgd, autocast=torch.float16)
    if kind != "backprop":
        schedule.scalers[:] = [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in range(4)]
    data = batches(8, dtype=torch.float32)
    train(schedule, data[:5])
    scale, before = schedule.scalers[2].get_scale(), copies(net)
    hook = poison(net, 2, math.inf)
    schedule.step(*data[5])
    hook.remove()
    assert schedule.scalers[2].get_scale() == scale / 2
    assert not {n for n in changed(net, before) if n.startswith(("model.stages.2", "heads.2"))}
    train(schedule, data[6:])
    assert changed(net, before) == trained(kind, net)


@every_path
@every_check
def test_on_gradients_may_spoil_them_and_may_mend_them(check, deferred):
    class Spoils(Greedy):
        def on_gradients(self, block):
            if block.index == 1:
                self.parameters[1][0].grad[0] = math.nan

    class Mends(Greedy):
        def on_gradients(self, block):
            for p in self.parameters[block.index]:
                p.grad.nan_to_num_(0.0)

    net, other = make_net(), make_net()
    net.engine.guard, other.engine.guard = FiniteGuard(deferred), FiniteGuard(deferred)
    before = copies(net)
    with pytest.raises(NonFiniteGradientError, match="block 1"):
        train(Spoils(net, sgd, check=check), batches(2))
    assert not {n for n in changed(net, before) if n.startswith(("model.stages.1", "heads.1"))}
    poison(other, 2)
    schedule, before = Mends(other, sgd, check=check), copies(other)
    train(schedule, batches(3))
    schedule.raise_pending()
    assert all(p.isfinite().all() for p in other.parameters())
    assert changed(other, before) == trained("greedy", other)


def test_large_gradients_are_finite():
    """Their squares are not, in float32."""
    net = make_net(dtype=torch.float32)
    net.model.stages[1][0].weight.register_hook(lambda g: torch.full_like(g, 1e30))
    schedule = Greedy(net, lambda params: torch.optim.SGD(params, lr=1e-30))
    before = net.model.stages[1][0].weight.detach().clone()
    schedule.step(*batch(dtype=torch.float32))
    torch.testing.assert_close(net.model.stages[1][0].weight, before - 1)


# ---- net.backward ---------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_backward_raises_before_the_users_optimizer_steps(value, deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    net.backward(*batch())
    net.zero_grad()
    before = copy.deepcopy(net.state_dict())
    hook = poison(net, 2, value)
    with pytest.raises(NonFiniteGradientError, match="block 2") as caught:
        net.backward(*batch())
    hook.remove()
    assert (caught.value.parameter, caught.value.step) == ("stages.2.0.weight", 1)
    same(net, Holder(before))
    net.zero_grad()
    net.backward(*batch())
    assert all(p.grad.isfinite().all() for p in net.parameters())


class Holder:
    def __init__(self, state):
        self.state_dict = lambda: state


@every_path
def test_backward_with_on_block_raises_before_the_block(deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    poison(net, 2)
    called, mean = [], net.model.stages[2][1].running_mean.clone()
    with pytest.raises(NonFiniteGradientError, match=r"block 2 .*'stages.2.0.weight'"):
        net.backward(*batch(), on_block=called.append)
    assert called == [0, 1]
    assert torch.equal(net.model.stages[2][1].running_mean, mean)


def test_backward_sees_what_calls_have_added_up():
    net = make_net(dtype=torch.float32)
    net.model.stages[1][0].weight.register_hook(lambda g: torch.full_like(g, 2e38))
    net.backward(*batch(dtype=torch.float32), weight=0.5)
    with pytest.raises(NonFiniteGradientError, match=r"block 1 is inf at step 1, in that of 'stages.1.0.weight'"):
        net.backward(*batch(dtype=torch.float32), weight=0.5)


def test_backward_leaves_it_to_a_scaler_that_is_enabled():
    net = make_net(dtype=torch.float32)
    hook = poison(net, 1, math.inf)
    optimizer, scaler = sgd(net.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(net.state_dict())
    net.backward(*batch(dtype=torch.float32), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    optimizer.zero_grad()
    with pytest.raises(NonFiniteGradientError):
        net.backward(*batch(dtype=torch.float32), scaler=torch.amp.GradScaler("cpu", enabled=False))
    hook.remove()


def test_it_is_caught_with_the_other_errors():
    assert issubclass(NonFiniteGradientError, NonFiniteLossError)
    assert issubclass(NonFiniteGradientError, SedonaError)


# ---- the check ------------------------------------------------------------------------------------------------------

TENSORS = {
    "float64": torch.full((3,), 1e300, dtype=torch.float64),
    "half": torch.full((4,), 6e4).half(),
    "complex": torch.ones(2, dtype=torch.complex64),
    "sparse": torch.eye(3).to_sparse(),
    "expanded": torch.ones(1).expand(3),
    "transposed": torch.ones(3, 4).t()[:2],
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_of_every_kind(name, bad):
    tensor, other = TENSORS[name], torch.ones(2)
    assert not not_finite([other, tensor, other]).item()
    assert first_not_finite([("a", tensor)]) is None
    spoilt = tensor * bad if name in ("sparse", "scalar", "complex") else tensor + bad
    if name == "empty":
        assert not not_finite([spoilt]).item()
        return
    assert not_finite([other, spoilt, other]).item()
    assert first_not_finite([("a", other), ("b", spoilt)])[0] == "b"


def test_sparse_gradients_of_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    data = torch.randint(5, (8,)), torch.randint(3, (8,))
    net = sedona_fx.decouple(model, data, cuts=["0", "1"], heads="linear", progress=False)
    schedule = Greedy(net, lambda params: torch.optim.SGD(params, lr=0.1))
    before = copies(net)
    schedule.step(*data)
    assert changed(net, before) == trained("greedy", net)
    net.model[0].weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFiniteGradientError, match=r"block 0 is nan at step 1, in that of '0.weight'"):
        schedule.step(*data)


def test_parameters_are_those_that_train():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False)))
    module[0].bias.requires_grad_(False)
    assert {id(p) for p in trained_in(module)} == {id(p) for p in module.parameters() if p.requires_grad}
