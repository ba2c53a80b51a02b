"""fit called again: it goes on where the call before ended; in a loop of one epoch it does what one call does."""

import functools

import pytest
import torch
from resuming import assert_equal
from small import batch, batches, make_net, same, sgd
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from sedona_fx.errors import CheckpointError, NonFiniteLossError, ScheduleError
from sedona_fx.train import Backprop, Greedy, fit


def loader():
    return DataLoader(TensorDataset(*batch(20)), batch_size=6, shuffle=True)


def rate(optimizer):
    return lr_scheduler.StepLR(optimizer, 2, 0.5)


def go(schedule, epochs, **options):
    return fit(schedule.net, loader(), epochs=epochs, schedule=schedule, progress=False, **options)


RATES = {
    "none": lambda: None,
    "function": lambda: rate,
    "lambda": lambda: lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "partial": lambda: functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
}


@pytest.mark.parametrize("kind", [Greedy, Backprop])
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
@pytest.mark.parametrize("saved", [False, True])
def test_a_loop_of_one_epoch_is_one_call(kind, rates, saved, tmp_path):
    one, loop = (kind(make_net(drop=0.3), sgd) for _ in range(2))
    options = {"checkpoint": tmp_path / "c.pt"} if saved else {}
    whole = go(one, 5, lr_scheduler=rates())
    parts = [go(loop, 1, lr_scheduler=rates(), **options) for _ in range(5)]
    same(one.net, loop.net)
    assert_equal(loop.state_dict(), one.state_dict())
    assert one.epochs == loop.epochs == 5
    assert [part.epochs[-1].epoch for part in parts] == [0, 1, 2, 3, 4]
    assert [part.epochs[-1].losses for part in parts] == [epoch.losses for epoch in whole.epochs]
    assert [len(part.epochs) for part in parts] == ([1, 2, 3, 4, 5] if saved else [1] * 5)


def test_the_shuffles_differ():
    seen = []
    schedule = Greedy(make_net(), sgd)
    step = schedule.step
    schedule.step = lambda x, y: (seen.append(tuple(y.tolist())), step(x, y))[1]
    for _ in range(3):
        go(schedule, 1)
    assert len({tuple(seen[k : k + 4]) for k in (0, 4, 8)}) == 3


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_a_loop_in_a_new_process_goes_on_where_the_old_one_was(done, tmp_path):
    straight, first, second = (Greedy(make_net(drop=0.3), sgd) for _ in range(3))
    go(straight, 4, lr_scheduler=rate)
    for _ in range(done):
        go(first, 1, checkpoint=tmp_path / "c.pt", lr_scheduler=rate)
    for _ in range(4):
        go(second, 1, checkpoint=tmp_path / "c.pt", lr_scheduler=rate)
    assert second.epochs == 4
    assert_equal(second.state_dict(), straight.state_dict())
    same(second.net, straight.net)


def test_what_was_changed_between_two_calls_stays(tmp_path):
    """As the LR that a plateau scheduler sets, in the loop that the error on it recommends."""
    schedule = Greedy(make_net(), sgd)
    plateaus = [lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0) for o in schedule.optimizers]
    rates = []
    for _ in range(3):
        go(schedule, 1, checkpoint=tmp_path / "c.pt")
        for plateau in plateaus:
            plateau.step(1.0)
        rates.append(schedule.optimizers[0].param_groups[0]["lr"])
    assert rates == [0.1, 0.05, 0.025]
    with pytest.raises(ScheduleError, match=r"loop around fit\(epochs=1\), whose calls go on"):
        go(schedule, 1, lr_scheduler=lr_scheduler.ReduceLROnPlateau)


def test_a_call_that_failed_goes_back_to_the_checkpoint(tmp_path):
    straight, schedule = (Greedy(make_net(drop=0.3), sgd) for _ in range(2))
    go(straight, 3)
    step = schedule.step

    def fails(x, y):
        if schedule.net.steps == 6:
            raise NonFiniteLossError(0, 6, float("nan"))
        return step(x, y)

    schedule.step = fails
    with pytest.raises(NonFiniteLossError):
        go(schedule, 3, checkpoint=tmp_path / "c.pt")
    schedule.step = step
    go(schedule, 3, checkpoint=tmp_path / "c.pt")
    assert_equal(schedule.state_dict(), straight.state_dict())
    same(schedule.net, straight.net)


def test_other_factories_make_new_rates():
    schedule = Greedy(make_net(), sgd)
    go(schedule, 2, lr_scheduler=lambda o: lr_scheduler.ConstantLR(o, 0.5, 10))
    go(schedule, 1, lr_scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.1))
    assert schedule.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_schedule_that_was_loaded_knows_its_epochs():
    one, two, straight = (Greedy(make_net(drop=0.3), sgd) for _ in range(3))
    go(one, 2)
    two.net.load_state_dict(one.net.state_dict())
    two.load_state_dict(one.state_dict())
    assert two.epochs == 2
    assert [epoch.epoch for epoch in go(two, 1).epochs] == [2]
    go(straight, 3)
    same(two.net, straight.net)


# ---- weights that are not finite ------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    net = make_net()
    schedule = Greedy(net, sgd)
    calls = []

    def loss(output, target):
        calls.append(1)
        value = torch.nn.functional.cross_entropy(output, target)
        return value + (output * 0).abs().sum().sqrt() if len(calls) > 12 else value  # from the fourth step on

    net.engine.loss = loss
    with pytest.raises(NonFiniteLossError, match="gradient of block 0 is nan at step 3"):
        fit(
            net,
            batches(6),
            epochs=1,
            schedule=schedule,
            checkpoint=tmp_path / "c.pt",
            checkpoint_every=1,
            progress=False,
        )
    state = torch.load(tmp_path / "c.pt")
    assert state["batch"] == 3
    assert all(value.isfinite().all() for value in state["net"].values())
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    """Here the step itself is too large for the dtype; every loss and gradient so far is finite."""
    net = make_net(dtype=torch.float32)
    schedule = Greedy(net, lambda params: torch.optim.SGD(params, lr=0.1))
    data, path = batches(6, dtype=torch.float32), tmp_path / "c.pt"
    options = {"schedule": schedule, "progress": False, "checkpoint": path}
    fit(net, data, epochs=1, **options)
    content = path.read_bytes()
    for group in schedule.optimizers[2].param_groups:
        group["lr"] = 3e38
    net.model.stages[2][0].weight.register_hook(lambda g: torch.full_like(g, 10.0))
    with pytest.raises(CheckpointError, match=r"no checkpoint is written behind step 6, .*'.*stages.2.0.weight' holds"):
        fit(net, data, epochs=1, checkpoint_every=1, **options)
    assert path.read_bytes() == content


def test_infinite_numbers_that_are_there_on_purpose_are_written(tmp_path):
    net = make_net()
    net.model.register_buffer("mask", torch.full((3,), float("-inf")))
    schedule = Greedy(net, sgd)
    go(schedule, 1, checkpoint=tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt")["net"]["model.mask"].isinf().all()
