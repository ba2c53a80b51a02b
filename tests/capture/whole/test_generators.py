"""Random generators of a model's own: a graph would keep a copy of them, so the module that draws stays whole."""

import copy

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import TraceError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class New(nn.Module):
    """Made anew in every call."""

    def forward(self, h):
        return h + torch.rand(8, generator=torch.Generator().manual_seed(h.shape[1]))


class Kept(nn.Module):
    """Goes on from call to call, and can be seeded from outside."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, h):
        return h + torch.rand(8, generator=self.generator)


class Model(nn.Module):
    def __init__(self, draw, asks):
        super().__init__()
        self.a, self.draw, self.b = nn.Linear(8, 8), draw(), nn.Linear(8, 3)
        self.asks = asks

    def forward(self, x):
        if self.asks and x.shape[1] != 8:
            raise ValueError("eight features")
        return self.b(self.draw(torch.tanh(self.a(x))))


class Top(Kept):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(super().forward(x))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("draw", [New, Kept])
def test_draws_are_those_of_the_model(draw, asks):
    net = sedona_fx.decouple(Model(draw, asks), (X, Y), blocks=1)
    assert net.capture.front_end == ("export" if asks else "symbolic")
    twin = copy.deepcopy(net.model)
    for module in (net, twin):
        module.eval()
    for _ in range(3):
        assert torch.equal(net(X), twin(X))
    if draw is Kept:
        for model in (net.model, twin):
            model.draw.generator.manual_seed(7)
        assert torch.equal(net(X), twin(X))


def test_draws_of_the_models_own_forward_are_refused():
    with pytest.raises(TraceError, match="in train mode draws random numbers"):
        sedona_fx.decouple(Top(), (X, Y), blocks=1)
