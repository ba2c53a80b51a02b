"""Names that Python reserves: read all the same, never renamed outside."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Named(nn.Module):
    """A layer called `name`, in a dictionary or as an attribute of the model."""

    def __init__(self, name, *, below, captured):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.captured = name, captured
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8)} if below else {})
        if not below:
            self.add_module(name, nn.Linear(8, 8))
        self.double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        h = self.b(self.a(x).tanh())
        layer = self.layers[self.name] if len(self.layers) else getattr(self, self.name)
        return self.c(layer(h).tanh())


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("below", [True, False], ids=["dictionary", "attribute"])
@pytest.mark.parametrize("name", ["class", "in", "lambda", "None", "self", "a-b", "1st"])
def test_reserved_by_python(name, below, captured):
    model = Named(name, below=below, captured=captured)
    path = f"layers.{name}" if below else name
    net = sedona_fx.decouple(model, (X, Y), cuts=["b", path], heads="linear")
    assert torch.equal(net(X), model(X))
    assert f"{path}.weight" in dict(net.blocks[1].module.named_parameters())
    net.backward(X, Y)
    m, head = copy.deepcopy(model), copy.deepcopy(net.heads["1"])
    layer = m.get_submodule(path)
    F.cross_entropy(head(layer(m.b(m.a(X).tanh()).detach())), Y).backward()
    torch.testing.assert_close(net.model.get_submodule(path).weight.grad, layer.weight.grad, rtol=1e-12, atol=0)
    Named(name, below=below, captured=captured).load_state_dict(net.original_state_dict())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), model(X))
