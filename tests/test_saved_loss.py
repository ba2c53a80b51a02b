"""A loaded net has the loss that it was saved with, or it is said that it has not."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import DataError, PlanError
from sedona_fx.train import Greedy

X, Y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def cubic(output, target):
    return (output - target).abs().pow(3).mean()


def saved(folder, loss, **options):
    net = sedona_fx.decouple(model(), (X, Y), cuts=["1"], heads="linear", loss=loss, progress=False, **options)
    net.save(folder)
    return net


def trains_alike(net, again):
    sgd = [Greedy(n, lambda params: torch.optim.SGD(params, lr=0.1)) for n in (net, again)]
    for _ in range(2):
        losses = [s.step(X, Y).losses for s in sgd]
        assert [a.item() for a in losses[0]] == [b.item() for b in losses[1]]


@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy, nn.SmoothL1Loss(), nn.CrossEntropyLoss()])
def test_losses_of_pytorch_come_back_by_themselves(tmp_path, loss):
    net = saved(tmp_path, loss)
    again = sedona_fx.load(tmp_path, model())
    assert again.plan == net.plan
    trains_alike(net, again)


@pytest.mark.parametrize("loss", [cubic, lambda o, t: F.mse_loss(o, t), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_other_losses_have_to_be_given_again(tmp_path, loss):
    net = saved(tmp_path, loss)
    with pytest.raises(PlanError, match=r"saved with the loss .*(cubic|lambda|smoothing=0\.1).*load\(\.\.\., loss="):
        sedona_fx.load(tmp_path, model())
    again = sedona_fx.load(tmp_path, model(), loss=loss)
    trains_alike(net, again)


def test_another_loss_is_warned_of(tmp_path):
    net = saved(tmp_path, cubic)
    assert f"loss {__name__}.cubic" in repr(net)
    with pytest.warns(UserWarning, match=r"with the loss .*cubic and is loaded with torch.nn.functional.mse") as seen:
        again = sedona_fx.load(tmp_path, model(), loss=F.mse_loss)
    assert seen[0].filename == __file__
    assert "loss torch.nn.functional.mse_loss" in repr(again)
    with pytest.warns(UserWarning, match=r"with the loss .*cubic and has none now: no schedule can train it"):
        again = sedona_fx.load(tmp_path, model(), loss=None)
    assert "loss none" in repr(again)
    with pytest.raises(DataError, match="cannot be called"):
        sedona_fx.load(tmp_path, model(), loss="mse")
    with pytest.raises(DataError, match="cannot be called"):
        sedona_fx.load(tmp_path, model(), loss=3)


def test_a_net_without_loss_stays_without(tmp_path):
    saved(tmp_path, None)
    assert sedona_fx.load(tmp_path, model()).engine.loss is None
    with pytest.warns(UserWarning, match=r"saved with the loss none and is loaded with torch"):
        sedona_fx.load(tmp_path, model(), loss=F.mse_loss)


def test_plans_from_before_losses_were_named_load_as_they_did(tmp_path):
    saved(tmp_path, F.mse_loss)
    data = json.loads((tmp_path / "plan.json").read_text())
    for name in ("loss", "local_losses", "checksum"):
        del data[name]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert sedona_fx.load(tmp_path, model()).engine.loss is F.cross_entropy
    assert sedona_fx.load(tmp_path, model(), loss=cubic).engine.loss is cubic


def local(output, inputs, target):
    return output.pow(2).mean()


def test_local_losses_have_to_be_given_again(tmp_path):
    own = sedona_fx.LocalLoss(local, "linear")
    options = {"cuts": ["1"], "local_loss": own, "loss": F.mse_loss, "progress": False}
    net = sedona_fx.decouple(model(), (X, Y), **options)
    net.save(tmp_path)
    assert net.plan.local_losses == (f"{__name__}.local",)
    assert f"block 0: {__name__}.local" in repr(net)
    with pytest.raises(PlanError, match=r"local losses of its own, \['.*local'\].*load\(\.\.\., local_loss=\.\.\.\)"):
        sedona_fx.load(tmp_path, model())
    again = sedona_fx.load(tmp_path, model(), local_loss=own)
    assert again.plan == net.plan
    trains_alike(net, again)
    other = sedona_fx.LocalLoss(lambda output, inputs, target: output.sum(), "linear")
    with pytest.warns(UserWarning, match=r"with the local losses \['.*local'\] and is loaded with \['.*lambda>'\]"):
        sedona_fx.load(tmp_path, model(), local_loss=other)


def test_a_plan_applied_anew_takes_the_loss_that_is_given(tmp_path):
    plan = saved(tmp_path, cubic).plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = sedona_fx.decouple(model(), (X, Y), plan=plan, loss=F.mse_loss)
    assert net.plan.loss == "torch.nn.functional.mse_loss"
