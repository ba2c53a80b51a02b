"""Where the tensors of a net live. The device ``meta`` stands for a second one: nothing is computed there."""

import pytest
import torch
from torch import Tensor, nn

import sedona_fx
from sedona_fx.errors import DataError, PlanError


class Reader(nn.Module):
    """Reads tensors by name: a parameter, a buffer in two places, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh() * self.mask
        x = self.norm(self.b(x)) * self.mask + self.shift
        return self.c(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


def test_every_block_lives_on_its_device_and_every_graph_sees_it():
    net = sedona_fx.decouple(Reader(), pair(), cuts=["a"], devices=["cpu", "meta"], heads="linear")
    first, second = net.blocks
    assert {p.device.type for p in first.parameters()} == {"cpu"}
    assert {p.device.type for p in second.parameters()} == {"meta"}
    assert net.model.norm.running_mean.device.type == "meta"
    assert net.model.shift.device.type == "meta"
    assert second.module.shift is net.model.shift
    for graph in (second.module, second.eval_module, net.graph_module):
        assert graph.mask is net.model.mask


def test_moving_a_net_moves_what_only_its_graphs_hold():
    net = sedona_fx.decouple(Reader(), pair(), cuts=["a"], heads="linear").double()
    x, y = pair()
    net.backward(x.double(), y)
    assert net(x.double()).dtype == torch.float64


def test_a_parameter_of_two_devices_is_refused():
    class Tied(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.b.weight = self.a.weight

    with pytest.raises(PlanError, match=r"'[ab].weight' is shared by block 0 on cpu and block 1 on meta"):
        sedona_fx.decouple(Tied(), pair(), cuts=["a"], devices=["cpu", "meta"], heads="linear")


def test_inputs_on_another_device_are_refused():
    net = sedona_fx.decouple(Reader(), pair(), cuts=["a"], heads="linear")
    x, y = pair()
    for call in (lambda: net(x.to("meta")), lambda: net.backward(x.to("meta"), y)):
        with pytest.raises(DataError, match=r"the input 'x' is on meta, the model is on cpu: .*x.to\('cpu'\)"):
            call()


class Captured(nn.Module):
    """Makes tensors on a device, in code that only torch.export can record."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four features")
        h = self.a(x) + torch.arange(4, device=x.device)
        return self.b(h.tanh() * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device))


def test_a_captured_model_makes_its_tensors_where_it_has_been_moved():
    x, y = pair()
    net = sedona_fx.decouple(Captured(), (x, y), cuts=["a"], heads="linear")
    assert net.plan.capture.front_end == "export"
    expected = net(x)
    net.to("meta")
    assert net(x.to("meta")).device.type == "meta"
    assert net.losses(x.to("meta"), y.to("meta"))[0].device.type == "meta"
    split = sedona_fx.decouple(Captured(), (x, y), cuts=["a"], devices=["cpu", "meta"], heads="linear")
    assert split(x).device.type == "meta"
    assert split(x).shape == expected.shape
