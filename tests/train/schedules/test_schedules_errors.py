"""What goes wrong, under every schedule: batches of other sizes, nets that do not serve, losses that are not finite."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kinds import ALL, HEADED, HEADLESS, FailsAt, changed, copies, trained
from resuming import assert_equal
from small import batch, batches, by_hand, make_net, sgd

from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.runtime.guard import FiniteGuard
from sedona_fx.train import BackLink, Replay, fit

every_kind = pytest.mark.parametrize("kind", ALL)
every_check = pytest.mark.parametrize("check", ["async", "sync"])
every_path = pytest.mark.parametrize("deferred", [None, True], ids=["host", "device"])


def train(schedule, pairs, then=lambda schedule: None):
    """Train, and do something with the schedule."""
    for x, y in pairs:
        schedule.step(x, y)
    then(schedule)


# ---- batches of other sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 1])
@every_kind
def test_a_smaller_batch_at_the_end_of_an_epoch(kind, size):
    net = make_net(norm=False)
    schedule, before = ALL[kind](net, sgd), copies(net)
    data = [*batches(3), batch(size, seed=9)]
    history = fit(net, data, epochs=3, schedule=schedule, progress=False)
    assert all(torch.tensor(epoch.losses).isfinite().all() for epoch in history.epochs)
    assert changed(net, before) == trained(kind, net)
    assert net.steps == 12
    if kind == "replay":
        assert schedule.counts.not_stored == 3
        assert "3 batches were not stored: buffers hold batches of 8" in schedule.report()
        assert {len(s["target"]) for b in schedule.buffers for s in b.snapshot()["items"]} == {8}


def test_block_0_alone_learns_of_a_batch_that_is_not_stored():
    net = make_net()
    schedule = Replay(net, sgd, capacity=2)
    for x, y in batches(3):
        schedule.step(x, y)
    stage, head = by_hand(net)[2][0]
    x, y = batch(5, seed=9)
    loss = schedule.step(x, y).losses[0]
    assert loss == F.cross_entropy(head(stage(x)), y)


# ---- nets and arguments that do not serve ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADED)
def test_schedules_that_need_heads(kind):
    advice = r"blocks \[0, 1, 2\] have no head.*leave out heads=False.*train.Backprop, sedona_fx.train.Delayed"
    with pytest.raises(ScheduleError, match=rf"^{kind.capitalize().replace('link', 'Link')} .*{advice}"):
        ALL[kind](make_net(heads=False), sgd)


@pytest.mark.parametrize("kind", HEADLESS)
def test_schedules_that_need_none(kind):
    net = make_net(heads=False)
    schedule = ALL[kind](net, sgd)
    for x, y in batches(5):
        assert len(schedule.step(x, y).losses) == 1
    with pytest.raises(ScheduleError, match=r"^net.losses .*blocks \[0, 1, 2\] have no head"):
        net.losses(*batch())
    headed = make_net()
    before = {name: p.clone() for name, p in headed.heads.state_dict().items()}
    for x, y in batches(5):
        schedule = ALL[kind](headed, sgd)
        schedule.step(x, y)
    assert_equal(dict(headed.heads.state_dict()), before, "heads, their statistics included")


def test_reach_is_at_most_a_block():
    net = make_net(cuts=["stages.1"])  # of two base layers, and two that are not reached into
    short = r"reach=3 is longer than block 0, which has 2 base layers and ends behind 'stages.1'.*reach=2 or less"
    with pytest.raises(ScheduleError, match=short):
        BackLink(net, sgd, reach=3)
    assert BackLink(net, sgd, reach=2).step(*batch()).losses[1].isfinite()
    uneven = make_net(cuts=["stages.1", "stages.2"])
    with pytest.raises(ScheduleError, match=r"reach=2 is longer than block 1, which has 1 base layer and ends behind"):
        BackLink(uneven, sgd, reach=2)
    for reach in (-1, True, 1.0, None):
        with pytest.raises(ScheduleError, match=r"is no number of base layers: give 0 or more"):
            BackLink(net, sgd, reach=reach)


@every_kind
def test_optimizer_factories_that_return_something_else(kind):
    net = make_net()
    everything = list(net.parameters())
    count = len(list(net.blocks[0].parameters() if kind in HEADED else net.blocks[0].base_parameters()))
    rest = len(everything) - count
    with pytest.raises(ScheduleError, match=r"optimizer= takes a factory.*not SGD itself"):
        ALL[kind](net, sgd(everything))
    with pytest.raises(ScheduleError, match=rf"{count} parameters of block 0 .* {rest} of them not of this block"):
        ALL[kind](net, lambda params: sgd(everything))
    with pytest.raises(ScheduleError, match=r"0 of them not of this block and 1 of the block's left out"):
        ALL[kind](net, lambda params: sgd(params[1:]))
    with pytest.raises(ScheduleError, match=r"returned list, not a torch\.optim\.Optimizer"):
        ALL[kind](net, lambda params: params)


@every_kind
def test_options_out_of_range(kind):
    for wrong in (0, -1, 1.0, True):
        with pytest.raises(ScheduleError, match=f"accumulate={wrong} is no number of batches"):
            ALL[kind](make_net(), sgd, accumulate=wrong)
    if kind != "backprop":
        with pytest.raises(ScheduleError, match="check='never' is neither 'async' nor 'sync'"):
            ALL[kind](make_net(), sgd, check="never")
    if kind in ("stashed", "current"):
        with pytest.raises(ScheduleError, match="weights='old' is neither 'stashed' nor 'current'"):
            ALL[kind](make_net(), sgd, weights="old")


@every_kind
def test_without_gradients_there_is_nothing_to_walk_back(kind):
    net = make_net()
    schedule = ALL[kind](net, sgd)
    with torch.no_grad(), pytest.raises(Exception, match=r"no_grad|has no gradient"):
        schedule.step(*batch())
    assert schedule.step(*batch()).losses[-1].isfinite()


# ---- losses that are not finite -------------------------------------------------------------------------------------


def state_of(schedule, block):
    """Return what training changes of a block: parameters, buffers and optimizer state."""
    part = schedule.net.blocks[block]
    tensors = [*part.parameters(), *part.buffers()]
    return copy.deepcopy([[t.detach() for t in tensors], schedule.optimizers[block].state_dict()["state"]])


def unchanged(schedule, before):
    """Return the blocks whose state is as before."""
    found = set()
    for block, state in enumerate(before):
        try:
            assert_equal(state_of(schedule, block), state)
            found.add(block)
        except AssertionError:
            pass
    return found


CASES = [(kind, block) for kind in HEADED for block in range(4)] + [("stashed", 3), ("current", 3), ("backprop", 3)]


@every_path
@every_check
@pytest.mark.parametrize(("kind", "block"), CASES)
def test_the_failing_block_is_unharmed_and_training_goes_on(kind, block, check, deferred):
    net = make_net(drop=0.2)
    net.engine.guard = FiniteGuard(deferred)
    schedule = ALL[kind](net, sgd, **({} if kind == "backprop" else {"check": check}))
    data = batches(12)
    train(schedule, data[:5])
    net.engine.loss = FailsAt(block if kind in HEADED else 0, float("inf"))
    before = [state_of(schedule, k) for k in range(4)]
    stored = [len(buffer.snapshot()["items"]) for buffer in getattr(schedule, "buffers", [])]
    late = deferred and (check == "async" or kind == "backprop")
    if late:
        schedule.step(*data[5])
        kept = unchanged(schedule, before)
        with pytest.raises(NonFiniteLossError, match=rf"block {block} is inf at step 5") as caught:
            schedule.step(*data[6])
        assert unchanged(schedule, before) == kept, "the step that raises does nothing else"
    else:
        with pytest.raises(NonFiniteLossError, match=rf"block {block} is inf at step 5") as caught:
            schedule.step(*data[5])
        kept = unchanged(schedule, before)
    assert (caught.value.block, caught.value.step) == (block, 5)
    if check == "sync" or kind == "backprop":
        assert kept == {0, 1, 2, 3}
        assert [len(buffer.snapshot()["items"]) for buffer in getattr(schedule, "buffers", [])] == stored
    else:
        assert block in kept
        if kind != "current":  # there, all wait for the last block
            assert not kept & set(range(block - 1))  # they had their turn; a link waits for the next block's loss
    parameters = copies(net)
    for x, y in data[7:]:
        losses = schedule.step(x, y).losses
    assert all(loss.isfinite() for loss in losses)
    assert changed(net, parameters) == trained(kind, net)
    assert all(t.isfinite().all() for t in (*net.parameters(), *net.buffers()))


@every_path
@every_check
@every_kind
def test_nothing_is_left_of_a_batch_that_is_not_finite(kind, check, deferred):
    """Not in BatchNorm's statistics, nor in buffers, nor in gradients that are still on their way."""
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    schedule = ALL[kind](net, sgd, **({} if kind == "backprop" else {"check": check}))
    data = batches(12)
    train(schedule, data[:5])
    with pytest.raises(NonFiniteLossError):
        train(schedule, [(data[5][0] * float("nan"), data[5][1]), data[6]])
    train(schedule, data[7:])
    assert all(t.isfinite().all() for t in (*net.parameters(), *net.buffers()))
    stored = [
        t for b in getattr(schedule, "buffers", []) for item in b.snapshot()["items"] for t in item["values"].values()
    ]
    assert all(t.isfinite().all() for t in stored)


@pytest.mark.parametrize("ask", [lambda s: s.state_dict(), lambda s: s.raise_pending()], ids=["state", "fit"])
@every_check
@every_kind
def test_who_asks_first_is_told_and_training_goes_on(kind, check, ask):
    """A late verdict comes to light when a state is wanted, or at the end of an epoch, too."""
    net = make_net()
    net.engine.guard = FiniteGuard(deferred=True)
    schedule = ALL[kind](net, sgd, **({} if kind == "backprop" else {"check": check}))
    data = batches(12)
    train(schedule, data[:5])
    net.engine.loss = FailsAt(3 if kind in HEADED else 0)
    with pytest.raises(NonFiniteLossError):
        train(schedule, data[5:6], ask)
    train(schedule, data[6:])
    assert all(t.isfinite().all() for t in (*net.parameters(), *net.buffers()))
    if kind == "replay":
        schedule.state_dict()


@every_path
def test_replay_keeps_no_batch_on_which_a_loss_was_not_finite(deferred):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    schedule = Replay(net, sgd, capacity=4)
    data = batches(6)
    train(schedule, data[:5])
    with pytest.raises(NonFiniteLossError, match="block 0 is nan at step 5"):
        train(schedule, [(data[5][0] * float("nan"), data[5][1]), data[0]])
    stored = [t for b in schedule.buffers for item in b.snapshot()["items"] for t in item["values"].values()]
    assert len(stored) >= 9  # the rest of them is there
    assert all(t.isfinite().all() for t in stored)


@every_kind
def test_optimizers_that_take_a_closure_are_refused(kind):
    class Closure(torch.optim.SGD):
        def step(self, loss):
            pass

    with pytest.raises(ScheduleError, match=r"LBFGS.step needs closure: .*a closure that calls net.backward"):
        ALL[kind](make_net(), torch.optim.LBFGS)
    with pytest.raises(ScheduleError, match=r"Closure.step needs loss"):
        ALL[kind](make_net(), lambda params: Closure(params, lr=0.1))
