"""fit: history, evaluation, learning rates, the progress bar, and data that does not serve."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import batch, batches, make_net, same, sgd
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sedona_fx.errors import DataError, NonFiniteLossError, ScheduleError
from sedona_fx.runtime.guard import FiniteGuard
from sedona_fx.train import Backprop, Greedy, evaluate, fit


def data(size=20):
    return TensorDataset(*batch(size))


def quiet(net, loader, **options):
    schedule = options.pop("schedule", None) or Greedy(net, sgd)
    return fit(net, loader, **{"schedule": schedule, "epochs": 2, "progress": False, **options})


class Bar:
    """Stands in for tqdm."""

    made: "list[Bar]"

    def __init__(self, total=None, initial=0, unit="", disable=False):
        self.total, self.n, self.initial, self.disable, self.seen = total, initial, initial, disable, {}
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        self.n += 1

    def set_description(self, text):
        self.text = text

    def set_postfix(self, values):
        self.seen = values


@pytest.fixture
def bar(monkeypatch):
    Bar.made = []
    monkeypatch.setitem(fit.__globals__, "tqdm", Bar)  # sedona_fx.train.fit is the function, not the module
    return Bar


def test_history_equals_a_loop_by_hand():
    net, other = make_net(), make_net()
    val = batches(3)
    loader = DataLoader(data(), batch_size=8)  # batches of 8, 8 and 4
    history = quiet(net, loader, val_loader=val)
    schedule = Greedy(other, sgd)
    for epoch in history.epochs:
        steps = [schedule.step(x, y).losses for x, y in loader]
        means = [sum(step[k].item() for step in steps) / 3 for k in range(4)]
        assert epoch.losses == pytest.approx(means, rel=1e-12)
        other.eval()
        outputs = [(other(x), y) for x, y in val]
        other.train()
        assert epoch.val_loss == pytest.approx(sum(F.cross_entropy(o, y).item() for o, y in outputs) / 3, rel=1e-12)
        assert epoch.val_accuracy == sum((o.argmax(1) == y).sum().item() for o, y in outputs) / 24
        assert epoch.seconds > 0
    same(net, other)
    assert [epoch.epoch for epoch in history.epochs] == [0, 1]
    assert history.seconds == sum(epoch.seconds for epoch in history.epochs)
    assert net.training


def test_backprop_history_has_the_final_loss_alone():
    net = make_net()
    history = quiet(net, batches(2), schedule=Backprop(net, sgd))
    assert [len(epoch.losses) for epoch in history.epochs] == [1, 1]
    assert history.epochs[0].val_loss is None


def test_the_same_seed_gives_the_same_net_and_another_another():
    nets = [make_net(drop=0.3) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        torch.rand(seed)  # whatever happened before
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        quiet(net, loader, seed=seed, schedule=Backprop(net, sgd))
    same(nets[0], nets[1])
    assert not torch.equal(nets[0].model.out.weight, nets[2].model.out.weight)


@pytest.mark.parametrize(("interval", "power"), [("epoch", 2), ("step", 6)])
def test_learning_rates_step_where_they_should(interval, power):
    net = make_net()
    schedule = Greedy(net, sgd)
    quiet(
        net,
        batches(3),
        schedule=schedule,
        lr_scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5),
        lr_interval=interval,
    )
    assert [o.param_groups[0]["lr"] for o in schedule.optimizers] == pytest.approx([0.1 * 0.5**power] * 4)


def test_batches_of_other_sizes_one_included():
    net = make_net(heads="linear", norm=True)
    net.model.eval()  # the model's own BatchNorm takes no batch of one
    history = quiet(net, DataLoader(data(17), batch_size=8), epochs=1)
    assert len(history.epochs[0].losses) == 4
    net = make_net(norm=False)
    loader = DataLoader(data(17), batch_size=8)
    quiet(net, loader, epochs=1, val_loader=loader)
    assert net.steps == 3


def test_one_pair_is_one_batch():
    net, other = make_net(), make_net()
    quiet(net, batch(), epochs=2, val_loader=batch())
    quiet(other, [batch()], epochs=2)
    same(net, other)


def test_modules_in_eval_mode_stay_there():
    net = make_net()
    net.model.stages[1][1].eval()
    before = net.model.stages[1][1].running_mean.clone()
    quiet(net, batches(2), val_loader=batches(1))
    assert torch.equal(net.model.stages[1][1].running_mean, before)
    assert not net.model.stages[1][1].training
    net.eval()
    quiet(net, batches(2))
    assert all(module.training for module in net.modules())


def test_samplers_are_told_the_epoch():
    dataset = data(16)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    told = []
    sampler.set_epoch = told.append
    quiet(make_net(), DataLoader(dataset, batch_size=8, sampler=sampler), epochs=3)
    assert told == [0, 1, 2]


# ---- the bar --------------------------------------------------------------------------------------------------------


def test_the_bar(bar, tmp_path):
    net = make_net()
    options = {"checkpoint": tmp_path / "c.pt", "progress": True}
    quiet(net, batches(3), val_loader=batches(1), **options)
    assert [(b.total, b.initial, b.n, b.disable) for b in bar.made] == [(6, 0, 6, False)]
    assert bar.made[0].text == "epoch 2/2"
    assert set(bar.made[0].seen) == {"train_loss", "val_loss", "val_accuracy"}
    quiet(make_net(), batches(3), epochs=5, **options)
    assert (bar.made[1].total, bar.made[1].initial, bar.made[1].n) == (15, 6, 15)
    quiet(make_net(), batches(3), epochs=5, **options)  # nothing left to do
    assert (bar.made[2].total, bar.made[2].initial, bar.made[2].n) == (15, 15, 15)
    quiet(make_net(), NoLength(), epochs=7, **options)
    assert (bar.made[3].total, bar.made[3].initial, bar.made[3].n) == (None, 15, 21)
    quiet(make_net(), batches(1), epochs=1)
    assert bar.made[4].disable


class NoLength:
    """Starts anew at each iter, although it is its own iterator."""

    def __iter__(self):
        self.rest = batches(3)
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return self.rest.pop(0)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluate_weights_by_examples_and_leaves_no_trace():
    net = make_net(drop=0.5)
    x, y = batch(20)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    whole = evaluate(net, [(x, y)])
    parts = evaluate(net, [(x[:16], y[:16]), (x[16:], y[16:])])
    assert whole == pytest.approx(parts)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def test_accuracy_only_where_targets_are_classes():
    x, y = batch()
    assert set(evaluate(make_net(), [(x, y)])) == {"loss", "accuracy"}
    net = make_net()
    net.engine.loss = lambda output, target: (output.sum(1) - target).square().mean()
    assert set(evaluate(net, [(x, y.double())])) == {"loss"}
    soft = F.one_hot(y, 3).double()
    net.engine.loss = F.cross_entropy
    assert set(evaluate(net, [(x, soft)])) == {"loss"}
    single = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    net = make_net(single, cuts=["0"], heads="linear", loss=lambda o, t: (o.squeeze(1) - t).square().mean())
    assert set(evaluate(net, [(x, y)])) == {"loss"}  # counts, say: no classes


def test_evaluation_data_that_is_empty():
    net = make_net()
    with pytest.raises(DataError, match="evaluation data is empty"):
        evaluate(net, [])
    assert net.training


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], r"the training data is empty: the loader gave no batch"),
        (DataLoader(TensorDataset(*batch(4)), batch_size=8, drop_last=True), r"is empty"),
        (
            (pair for pair in batches(2)),
            r"one-shot iterator \(generator\).*exhausted after one epoch.*DataLoader or a list",
        ),
        (zip([1], [2], strict=True), r"one-shot iterator \(zip\)"),
        (iter(DataLoader(TensorDataset(*batch(8)), batch_size=8)), r"exhausted: an iterator gives its batches once"),
        ([batch()[0]], r"the training data gives a Tensor where \(inputs, target\) is expected"),
        ([(*batch(), 3)], r"gives a tuple of 3 where"),
        (3, r"the training data is int, neither"),
    ],
)
def test_data_that_does_not_serve(loader, match):
    with pytest.raises(DataError, match=match):
        quiet(make_net(), loader)


def test_one_epoch_of_an_iterator_is_fine():
    assert len(quiet(make_net(), iter(batches(2)), epochs=1).epochs) == 1


def test_arguments_that_do_not_go_together(tmp_path):
    net = make_net()
    with pytest.raises(ScheduleError, match="made for another net"):
        quiet(net, batches(1), schedule=Greedy(make_net(), sgd))
    with pytest.raises(ScheduleError, match="neither 'epoch' nor 'step'"):
        quiet(net, batches(1), lr_interval="batch")
    with pytest.raises(ScheduleError, match="needs checkpoint=FILE"):
        quiet(net, batches(1), checkpoint_every=3)
    with pytest.raises(ScheduleError, match="to be 1 or more"):
        quiet(net, batches(1), checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    with pytest.raises(ScheduleError, match="ReduceLROnPlateau needs a metric"):
        quiet(net, batches(1), lr_scheduler=lr_scheduler.ReduceLROnPlateau)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("every", [None, 1])
def test_a_loss_that_fails_at_the_very_end_is_raised_before_the_checkpoint(deferred, every, tmp_path):
    net = make_net()
    net.engine.guard = FiniteGuard(deferred)
    calls = []

    def loss(output, target):
        calls.append(1)
        value = F.cross_entropy(output, target)
        return value * float("inf") if len(calls) == 23 else value  # block 2 of the sixth step, the last

    net.engine.loss = loss
    path = tmp_path / "c.pt"
    with pytest.raises(NonFiniteLossError, match="block 2 is inf at step 5"):
        quiet(net, batches(3), checkpoint=path, checkpoint_every=every)
    state = torch.load(path)
    assert (state["epoch"], state["batch"]) == ((1, 0) if every is None else (1, 2))
    assert state["schedule"]["steps"] == state["done"] == (3 if every is None else 5)
