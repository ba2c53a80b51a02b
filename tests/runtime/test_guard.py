"""A loss that is not finite: the failing block keeps what it has, on the host's path and on the device's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import batch, batches, by_hand, make_net, make_tied, same, sgd

import sedona_fx
from sedona_fx.errors import NonFiniteLossError
from sedona_fx.runtime.guard import FiniteGuard
from sedona_fx.train import Backprop, Greedy

OPTIMIZERS = {
    "sgd": sgd,
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "fused adam": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
every_path = pytest.mark.parametrize("deferred", [None, True, False], ids=["default", "device", "host"])


class Failing:
    """Cross entropy, infinite (with infinite gradients) in one block at one step."""

    def __init__(self, block, step, value=float("inf"), blocks=4):
        self.block, self.step, self.value, self.blocks, self.calls = block, step, value, blocks, 0

    def __call__(self, output, target):
        step, block = divmod(self.calls, self.blocks)
        self.calls += 1
        loss = F.cross_entropy(output, target)
        return loss * self.value if (block, step) == (self.block, self.step) else loss


def state_of(net, schedule):
    """Return everything that training changes, by block."""
    blocks = [{f"block {k}": [*b.parameters(), *b.buffers()] for k, b in enumerate(net.blocks)}]
    optimizers = [o.state_dict()["state"] for o in schedule.optimizers]
    return copy.deepcopy([{"tensors": blocks[0][f"block {k}"], "state": optimizers[k]} for k in range(len(net.blocks))])


def equal(a, b):
    leaves = torch.utils._pytree.tree_leaves
    return len(leaves(a)) == len(leaves(b)) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def fail(deferred, optimizer, block, step, value=float("inf"), **options):
    """Train until a loss fails; return the state of all blocks before and after the failing step, and the error."""
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    schedule = Greedy(net, optimizer, **options)
    net.engine.loss = Failing(block, step, value)
    data = batches(step + 2)
    for x, y in data[:step]:
        schedule.step(x, y)
    before = state_of(net, schedule)
    buffers = copy.deepcopy(list(net.model.buffers()))
    at_once = True
    try:
        schedule.step(*data[step])
        at_once = False
        after = state_of(net, schedule)
        with pytest.raises(NonFiniteLossError) as caught:
            schedule.step(*data[step + 1])
        assert equal(after, state_of(net, schedule)), "the step that raises late does nothing else"
        error = caught.value
    except NonFiniteLossError as raised:
        error, after = raised, state_of(net, schedule)
    assert (error.block, error.step) == (block, step)
    assert f"block {block} is {value} at step {step}" in str(error)
    return before, after, at_once, buffers, net, schedule


@every_optimizer
@every_path
@pytest.mark.parametrize(("block", "step"), [(0, 0), (2, 0), (1, 3), (3, 2)])
def test_async_the_failing_block_is_unharmed(deferred, optimizer, block, step):
    before, after, at_once, *_ = fail(deferred, optimizer, block, step)
    assert at_once == (deferred is not True)
    for k in range(4):
        stepped = k < block or (k > block and deferred is True)
        assert equal(before[k], after[k]) == (not stepped), f"block {k}"


@every_path
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_minus_infinity(deferred, value):
    before, after, *_ = fail(deferred, sgd, 1, 1, value)
    assert equal(before[1], after[1])
    assert not equal(before[0], after[0])


@every_optimizer
@every_path
@pytest.mark.parametrize("block", [0, 2, 3])
def test_sync_nobody_steps_and_all_buffers_stay(deferred, optimizer, block):
    before, after, at_once, buffers, net, _ = fail(deferred, optimizer, block, 2, check="sync")
    assert at_once
    assert equal(before, after)
    assert equal(buffers, list(net.model.buffers()))


@every_path
@pytest.mark.parametrize("check", ["async", "sync"])
def test_training_goes_on_after_the_error(deferred, check):
    *_, net, schedule = fail(deferred, sgd, 1, 1, check=check)
    for x, y in batches(3):
        result = schedule.step(x, y)
    assert all(loss.isfinite() for loss in result.losses)
    assert all(p.isfinite().all() for p in net.parameters())


@every_optimizer
@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_the_device_path_gives_the_same_numbers(optimizer, check, drop):
    net, other = make_net(drop=drop), make_net(drop=drop)
    other.engine.guard = FiniteGuard(deferred=True)
    one, two = Greedy(net, optimizer, check=check), Greedy(other, optimizer, check=check)
    for x, y in batches(6):
        one.step(x, y)
        two.step(x, y)
    same(net, other)


def test_the_device_path_waits_for_no_loss_with_fused_optimizers(monkeypatch):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred=True)
    schedule = Greedy(net, OPTIMIZERS["fused sgd"])
    x, y = batch()
    schedule.step(x, y)
    waited = []
    value = sedona_fx.runtime.guard.Verdict.value
    monkeypatch.setattr(sedona_fx.runtime.guard.Verdict, "value", lambda v: (waited.append(v.step), value(v))[1])
    schedule.step(x, y)
    assert waited == [0] * 4  # of the step before
    schedule.step(x, y)
    assert waited == [0] * 4 + [1] * 4


@every_path
def test_shared_parameters_stay_if_any_contribution_fails(deferred):
    net = make_tied()
    net.engine.guard = FiniteGuard(deferred)
    schedule = Greedy(net, OPTIMIZERS["fused sgd"])
    net.engine.loss = Failing(0, 1)
    schedule.step(*batch())
    shared = net.model.stages[3].weight.clone()
    if deferred is True:
        schedule.step(*batch())
    with pytest.raises(NonFiniteLossError, match="block 0"):
        schedule.step(*batch())
    assert torch.equal(net.model.stages[3].weight, shared)


@every_path
@every_optimizer
@pytest.mark.parametrize("step", [0, 2])
def test_backprop(deferred, optimizer, step):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    schedule = Backprop(net, optimizer)
    net.engine.loss = Failing(0, step, blocks=1)
    for _ in range(step):
        schedule.step(*batch())
    before = state_of(net, schedule)
    if deferred is True:
        schedule.step(*batch())
    with pytest.raises(NonFiniteLossError, match=rf"block 3 is inf at step {step}"):
        schedule.step(*batch())
    assert equal(before, state_of(net, schedule))


@every_path
def test_backward_raises_before_the_users_optimizer_steps(deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    net.engine.loss = Failing(2, 1)
    optimizer = sgd(net.parameters())
    net.backward(*batch())
    optimizer.step()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteLossError, match="block 2 is inf at step 1"):
        net.backward(*batch())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    optimizer.zero_grad()
    net.backward(*batch())  # nothing is left of it
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@every_path
def test_backward_with_on_block_raises_before_the_failing_block(deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    net.engine.loss = Failing(2, 0)
    called = []
    with pytest.raises(NonFiniteLossError):
        net.backward(*batch(), on_block=called.append)
    assert called == [0, 1]


def test_other_errors_leave_the_blocks_buffers_alone_too():
    net = make_net()
    stage, _ = by_hand(net)[2][2]

    def loss(output, target):
        loss.calls += 1
        if loss.calls == 3:
            raise KeyError("mine")
        return F.cross_entropy(output, target)

    loss.calls = 0
    net.engine.loss = loss
    with pytest.raises(sedona_fx.SedonaError, match="mine"):
        Greedy(net, sgd).step(*batch())
    same(net.model.stages[2], stage)


def test_copies_do_not_inherit_what_is_pending():
    net = make_net()
    net.engine.guard = FiniteGuard(deferred=True)
    net.engine.loss = Failing(0, 0)
    schedule = Greedy(net, sgd)
    schedule.step(*batch())
    twin = copy.deepcopy(net)
    assert twin.engine.guard.deferred is True
    twin.backward(*batch())
    with pytest.raises(NonFiniteLossError):
        schedule.state_dict()
