"""A slice of the support table: a small model of each kind, and every promise that its row would claim."""

from dataclasses import replace

import promises
import pytest
import torch
from catalogue import catalogue
from gradient_promise import gradients
from row import KEPT, SKIPPED, measure
from support_classes import NUMBERS, works
from support_page import page
from torch import nn

ENTRIES = catalogue()

SLICE = (
    "torchvision classification/shufflenet_v2_x0_5",
    "torchvision classification/googlenet",
    "timm/convnextv2_atto",
    "timm/gmlp_ti16_224",
    "timm/mobilenetv4_conv_small",
    "timm/vit_tiny_patch16_224",
    "transformers/bert",
    "transformers/gpt2",
    "transformers/bart",
    "transformers/wav2vec2",
    "torchvision detection/ssdlite320_mobilenet_v3_large",
    "torchvision segmentation/lraspp_mobilenet_v3_large",
)


@pytest.mark.parametrize("key", SLICE)
def test_every_promise_is_kept(key):
    entry = ENTRIES[key]
    told: list[str] = []
    row = measure(entry, lambda row: told.append(row["doing"]))
    assert row["reason"] == ""
    broken = {number: reason for number, reason in row["promises"].items() if reason not in (KEPT, SKIPPED)}
    assert not broken
    assert set(row["promises"]) == set(NUMBERS)
    assert works(row)
    assert told[-1] == ""
    assert page([row]).count("✓") >= (5 if entry.headless else 8)


def test_the_catalogue_is_as_wide_as_the_table_claims():
    kinds = [entry.family for entry in ENTRIES.values()]
    assert sum(kind.startswith("torchvision") for kind in kinds) >= 109
    assert kinds.count("timm") >= 40
    assert kinds.count("transformers") >= 16


# ---- a promise that is broken is reported ---------------------------------------------------------------------------


@pytest.fixture
def case():
    return promises.make_case(ENTRIES["torchvision classification/shufflenet_v2_x0_5"])


def test_a_wrong_output_is_seen(case):
    case.reset()
    with torch.no_grad():
        next(case.model.parameters()).add_(1.0)  # the twin and the net follow, a frozen graph of the old would not
    assert promises.forward(case) == ""
    original = case.net.call
    case.net.call = lambda inputs: original(inputs) * (1 + 1e-6)
    assert "differs by" in promises.forward(case)


def test_a_touched_model_is_seen(case):
    with torch.no_grad():
        next(case.model.parameters()).mul_(2)
    assert "changed" in promises.untouched(case)


def test_a_gradient_that_crosses_is_seen(case):
    losses = case.net.losses
    case.net.losses = lambda x, y: [sum(losses(x, y))] * len(case.net.blocks)
    assert "of another block" in promises.isolation(case)


def test_a_mode_that_is_not_set_is_seen(case):
    train = case.net.train

    def forget(mode=True):
        train(mode)
        case.net.model.fc.training = not mode
        return case.net

    case.net.train = forget
    assert "fc" in promises.modes(case)


def test_a_wrong_gradient_is_seen(monkeypatch):
    entry = ENTRIES["timm/vit_tiny_patch16_224"]
    net = promises.make_case(entry).net
    backward = type(net).backward

    def off(self, x, y, **how):
        result = backward(self, x, y, **how)
        with torch.no_grad():
            self.model.blocks[0].mlp.fc1.weight.grad.mul_(1 + 1e-9)
        return result

    monkeypatch.setattr(type(net), "backward", off)
    assert "is off by" in gradients(entry, net)


def test_a_refusal_without_a_reason_is_no_row_that_works():
    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x) if torch.rand([]) < 2 else x

    entry = replace(
        ENTRIES["torchvision classification/resnet18"],
        build=Refused,
        pair=lambda: (torch.randn(4, 3), torch.arange(4) % 3),
        refused="rand",
    )
    row = measure(entry, lambda _: None)
    assert row["refused"]
    assert not works(row)
    assert "torch.rand([])" in row["reason"]
