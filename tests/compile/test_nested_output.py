"""Models whose float tensors are all inside of fields of their output: detectors with two sets of predictions."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import DataError, OutputError
from sedona_fx.train import Backprop

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 3


class Detector(nn.Module):
    """As YOLOv10: one prediction for many boxes, one on detached features; another form in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.many, self.one = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = self.b(self.a(x).tanh()).tanh()
        raw = {"many": {"boxes": self.many(h), "feats": [h]}, "one": {"boxes": self.one(h.detach())}}
        return raw if self.training else (raw["one"]["boxes"], raw)


def whole(output, target):
    return F.cross_entropy(output["many"]["boxes"], target) + F.cross_entropy(output["one"]["boxes"], target)


def part(output, target):
    one = output["one"]
    return F.cross_entropy(output["many"]["boxes"], target) + (
        F.cross_entropy(one["boxes"], target) if one is not None else 0
    )


def test_backprop_over_blocks_is_the_models():
    model = Detector().double()
    net = sedona_fx.decouple(model, (X, Y), loss=whole, cuts=["a"], heads=False)
    Backprop(net, lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(X, Y)
    whole(model(X), Y).backward()
    for name, parameter in net.model.named_parameters():
        own = model.get_parameter(name)
        torch.testing.assert_close(own - parameter, own.grad, rtol=1e-9, atol=1e-12)
    primary, raw = net.eval()(X)
    assert torch.equal(primary, raw["one"]["boxes"])


@pytest.mark.parametrize("output", [None, "many.boxes", ("many", "boxes")])
def test_a_head_imitates_a_field_of_a_field(output, tmp_path):
    model = Detector().double()
    net = sedona_fx.decouple(model, (X, Y), loss=part, cuts=["a"], heads="linear", output=output)
    head, twin = copy.deepcopy(net.heads["0"]), copy.deepcopy(model)
    net.backward(X, Y)
    h = twin.a(X)
    F.cross_entropy(head(h), Y).backward()
    h = twin.b(h.detach().tanh()).tanh()
    (F.cross_entropy(twin.many(h), Y) + F.cross_entropy(twin.one(h.detach()), Y)).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-14)
    net.save(tmp_path / "net.pt")
    loaded = sedona_fx.load(tmp_path / "net.pt", Detector().double(), loss=part)
    assert loaded.plan.output == (None if output is None else "many.boxes")
    assert torch.equal(loaded(X)["many"]["boxes"], net(X)["many"]["boxes"])


def test_errors_name_the_path():
    with pytest.raises(DataError, match=r"a head imitates the primary output \('many.boxes'\)"):
        sedona_fx.decouple(Detector().double(), (X, Y), loss=whole, cuts=["a"], heads="linear")
    with pytest.raises(OutputError, match=r"output='many.box' names no float tensor.*'many.boxes', 'many.feats.0'"):
        sedona_fx.decouple(Detector().double(), (X, Y), loss=part, cuts=["a"], output="many.box")
