"""evaluate with a loss and metrics of its own, where the training's loss smooths labels or takes soft targets."""

import pytest
import torch
import torch.nn.functional as F
from small import batch, batches, make_net, sgd
from torch import nn

from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.train import Greedy, evaluate, fit


def by_hand(net, data, function):
    """Return the mean of a function of outputs and targets over examples."""
    net.eval()
    with torch.no_grad():
        total = sum(float(function(net(x), y)) * len(x) for x, y in data) / sum(len(x) for x, _ in data)
    net.train()
    return total


def soft(output, target):
    return -(target * output.log_softmax(1)).sum(1).mean()


def error_rate(output, target):
    return (output.argmax(1) != target).double().mean()


DATA = [batch(8), batch(5, seed=3)]


def test_the_training_smooths_labels_and_the_evaluation_does_not():
    net = make_net()
    net.engine.loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    smoothed = by_hand(net, DATA, net.engine.loss)
    plain = by_hand(net, DATA, F.cross_entropy)
    assert abs(smoothed - plain) > 1e-3
    assert evaluate(net, DATA)["loss"] == pytest.approx(smoothed, rel=1e-12)
    assert evaluate(net, DATA, val_loss=F.cross_entropy)["loss"] == pytest.approx(plain, rel=1e-12)


def test_the_training_takes_soft_targets_and_the_evaluation_data_has_classes():
    net = make_net()
    net.engine.loss = soft
    with pytest.raises(DataError, match=r"evaluation takes the training's loss; val_loss=\.\.\. gives it one"):
        evaluate(net, DATA)
    found = evaluate(net, DATA, val_loss=F.cross_entropy, metrics={"error": error_rate})
    assert found["loss"] == pytest.approx(by_hand(net, DATA, F.cross_entropy), rel=1e-12)
    assert found["error"] == pytest.approx(by_hand(net, DATA, error_rate), rel=1e-12)
    assert found["accuracy"] == pytest.approx(1 - found["error"], rel=1e-12)
    assert net.training


def test_fit_takes_both():
    net = make_net()
    net.engine.loss = soft
    train = [(x, F.one_hot(y, 3).double()) for x, y in batches(3)]
    options = {"val_loss": F.cross_entropy, "metrics": {"error": error_rate, "one": lambda o, t: 1}}
    schedule = Greedy(net, sgd)
    history = fit(net, train, epochs=2, schedule=schedule, val_loader=DATA, progress=False, **options)
    last = history.epochs[-1]
    assert last.val_loss == pytest.approx(by_hand(net, DATA, F.cross_entropy), rel=1e-12)
    assert last.val_metrics == pytest.approx({"error": by_hand(net, DATA, error_rate), "one": 1.0}, rel=1e-12)
    assert last.val_accuracy == pytest.approx(1 - last.val_metrics["error"], rel=1e-12)


def test_metrics_come_back_from_a_checkpoint(tmp_path):
    def go(epochs):
        net = make_net()
        options = {"val_loader": DATA, "metrics": {"error": error_rate}, "checkpoint": tmp_path / "c.pt"}
        return fit(net, batches(2), epochs=epochs, schedule=Greedy(net, sgd), progress=False, **options)

    first = go(1)
    assert go(2).epochs[0] == first.epochs[0]


def test_an_accuracy_of_the_users_takes_the_place_of_the_built_in_one():
    assert evaluate(make_net(), DATA, metrics={"accuracy": lambda o, t: 0.25})["accuracy"] == 0.25


def test_a_net_without_a_loss_is_evaluated_by_its_own():
    net = make_net()
    net.engine.loss = None
    with pytest.raises(ScheduleError, match=r"no loss.*val_loss="):
        evaluate(net, DATA)
    assert evaluate(net, DATA, val_loss=F.cross_entropy)["loss"] > 0


def test_what_does_not_serve():
    net = make_net()
    with pytest.raises(ScheduleError, match="val_loss= takes a function"):
        evaluate(net, DATA, val_loss="ce")
    with pytest.raises(ScheduleError, match="metrics= takes a mapping"):
        evaluate(net, DATA, metrics=[error_rate])
    for wrong in ({"loss": error_rate}, {1: error_rate}, {"a": 3}):
        with pytest.raises(ScheduleError, match="metrics= holds"):
            evaluate(net, DATA, metrics=wrong)
    with pytest.raises(OutputError, match=r"the metric 'a' must return a number .* not Tensor\(8,\)"):
        evaluate(net, DATA, metrics={"a": lambda o, t: o.argmax(1)})
    with pytest.raises(ScheduleError, match="need val_loader="):
        fit(net, DATA, epochs=1, schedule=Greedy(net, sgd), val_loss=F.cross_entropy, progress=False)


def test_errors_of_the_users_own_functions_go_through():
    def broken(output, target):
        raise KeyError("mine")

    for options in ({"val_loss": broken}, {"metrics": {"a": broken}}):
        with pytest.raises(KeyError, match="mine"):
            evaluate(make_net(), DATA, **options)
