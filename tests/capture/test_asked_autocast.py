"""Forwards that ask whether autocast is on, in programs that torch.export captures while it is not."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import ScheduleError
from sedona_fx.ir.graph import info
from sedona_fx.ir.region import Cast, region_of

X = torch.randn(3, 300, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2])


def maybe_autocast(device_type, enabled):
    """As in transformers 5: no region where it would change nothing."""
    if torch.is_autocast_enabled(device_type) or enabled:
        return torch.autocast(device_type, enabled=enabled)
    return contextlib.nullcontext()


class Rotary(nn.Module):
    """Rotates features by their position, up to 300: in bfloat16 positions from 257 on are not all different."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("frequency", torch.tensor([1.0, 0.5, 0.25, 0.125]))

    def forward(self, x):
        if x.shape[2] != 8:
            raise ValueError("eight features")
        h = self.a(x)
        with maybe_autocast(x.device.type, enabled=False):
            position = torch.arange(x.shape[1], device=x.device).float()[None, :, None].expand(len(x), -1, 1)
            angle = position @ self.frequency[None, None, :].expand(len(x), 1, 4)
            cos, sin = angle.cos(), angle.sin()
        left, right = h[..., :4], h[..., 4:]
        h = torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
        return self.fc(self.b(h).tanh()[:, -20:].mean(1))


class Branching(Rotary):
    """Computes something else under autocast."""

    def forward(self, x):
        if x.shape[2] != 8:
            raise ValueError("eight features")
        h = self.a(x)
        if torch.is_autocast_enabled(x.device.type):
            h = h.tanh()
        return self.fc(self.b(h).tanh()[:, -20:].mean(1))


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
def test_a_region_that_is_opened_under_autocast_alone_is_in_the_graph(low):
    model = Rotary()
    net = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
    assert net.plan.capture.front_end == "export"
    off = Cast("cpu", False)
    inside = [n for n in net.graph_module.graph.nodes if region_of(n) and off in region_of(n).casts]
    assert {"arange", "cos", "sin"} <= {n.target.overloadpacket.__name__ for n in inside}
    assert {info(n).block for n in inside} == {1}
    context = torch.autocast("cpu", dtype=low, enabled=low is not None)
    with context:
        expected = model(X)
        assert torch.equal(net(X), expected)
        loss = F.cross_entropy(expected, Y)
        found = net.backward(X, Y)
    assert torch.equal(found.losses[-1], loss.detach())
    loss.backward()
    assert torch.equal(net.model.b.weight.grad, model.b.weight.grad)


def test_code_that_computes_something_else_is_right_without_autocast_and_refused_under_it():
    model = Branching()
    net = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
    assert torch.equal(net(X), model(X))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ScheduleError, match=r"under autocast to torch\.bf"),
    ):
        net(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
        assert torch.equal(other(X), model(X))
