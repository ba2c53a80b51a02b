"""Losses by name."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sedona_fx.ir.loss import loss_name, named_loss, same_loss


def own(output, target):
    return output.sum()


class Own:
    def __call__(self, output, target):
        return output.sum()

    def method(self, output, target):
        return output.sum()


CE = "torch.nn.modules.loss.CrossEntropyLoss"


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (None, "none"),
        (F.cross_entropy, "torch.nn.functional.cross_entropy"),
        (F.l1_loss, "torch.nn.functional.l1_loss"),
        (own, f"{__name__}.own"),
        (Own(), f"{__name__}.Own"),
        (Own().method, f"{__name__}.Own.method"),
        (nn.CrossEntropyLoss(), CE),
        (nn.CrossEntropyLoss(label_smoothing=0.1), f"{CE}(label_smoothing=0.1)"),
        (nn.CrossEntropyLoss(torch.ones(3)), f"{CE}(weight=tensor(3,))"),
        (nn.PoissonNLLLoss(), "torch.nn.modules.loss.PoissonNLLLoss"),
        (
            functools.partial(F.cross_entropy, label_smoothing=0.1),
            "functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)",
        ),
        (functools.partial(own, target=None), f"functools.partial({__name__}.own, target=None)"),
    ],
)
def test_names(loss, name):
    assert loss_name(loss) == name


def test_the_way_back_is_for_losses_of_pytorch_with_default_settings():
    assert named_loss("torch.nn.functional.cross_entropy") is F.cross_entropy
    assert isinstance(named_loss(CE), nn.CrossEntropyLoss)
    for name in ("none", "os.system", "torch.nn.functional.torch.os", f"{CE}(label_smoothing=0.1)", "loss.own", ""):
        assert named_loss(name) is None


def test_a_script_run_itself_has_another_module():
    assert same_loss("__main__.own", "train.own")
    assert same_loss("train.own", "__main__.own")
    assert not same_loss("__main__.own", "train.other")
    assert not same_loss("a.own", "b.own")
