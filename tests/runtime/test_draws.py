"""Which blocks count as drawing random numbers: all that could, and none of the common layers that do not."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import NonFiniteLossError
from sedona_fx.runtime.draws import may_draw
from sedona_fx.train import Greedy

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


class Between(nn.Module):
    """A chain of three layers with something between the first two."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.c(self.b(self.between(self.a(x))).tanh())


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Drawing(nn.Module):
    def forward(self, h):
        return h + torch.rand(()) if self.training else h


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: output + torch.rand(()))
    return module


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


DRAW = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of nothing": lambda: nn.Dropout(0.0),  # it may be raised later
    "functional": lambda: lambda h: F.dropout(h, 0.5),
    "noise": lambda: lambda h: h + torch.randn_like(h),
    "in place": lambda: lambda h: h + torch.empty_like(h).bernoulli_(0.5),
    "rrelu": nn.RReLU,
    "fractional pooling": lambda: (
        lambda h: F.fractional_max_pool2d(h.view(-1, 1, 2, 4), 1, output_size=(2, 4)).view(-1, 8)
    ),
    "a module of the user's": Drawing,
    "a hook": lambda: hooked(nn.Tanh()),
    "a parametrization": spectral,
    "an encoder": lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
}
QUIET = {
    "norm": lambda: nn.BatchNorm1d(8),
    "layer norm": lambda: nn.LayerNorm(8),
    "activation": nn.GELU,
    "functional": lambda: lambda h: F.relu(h) * 2 + h.exp().clamp(max=1),
    "in place": lambda: nn.ReLU(inplace=True),
    "containers": lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.SiLU(), nn.Identity())),
}


def net_of(between):
    between = between if isinstance(between, nn.Module) else Calls(between)
    leaf = ["between"] if type(between) is Drawing else []
    return sedona_fx.decouple(Between(between), (X, Y), cuts=["b"], heads="linear", leaf_modules=leaf)


@pytest.mark.parametrize("kind", DRAW)
def test_blocks_that_may_draw_are_seeded(kind):
    net = net_of(DRAW[kind]())
    assert may_draw(net.blocks[0].module)
    assert not may_draw(net.blocks[1].module)
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        net.steps = 0
        results.append(torch.stack(net.losses(X, Y)).detach())
        assert torch.equal(torch.get_rng_state(), before)
    if kind != "a parametrization":  # its power iteration goes on
        assert torch.equal(*results)


@pytest.mark.parametrize("kind", QUIET)
def test_common_layers_draw_nothing(kind):
    net = net_of(QUIET[kind]())
    assert not any(may_draw(block.module) or may_draw(block.eval_module) for block in net.blocks)
    before = torch.get_rng_state()
    Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "drawing"), [("resnet18", []), ("vgg11_bn", [1]), ("densenet121", None)])
def test_models_of_torchvision(name, drawing):
    model = torchvision.models.get_model(name, num_classes=10)
    data = (torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    net = sedona_fx.decouple(model, data, blocks=2, search="uniform", heads="linear")
    if drawing is not None:
        assert [block.index for block in net.blocks if may_draw(block.module)] == drawing


def test_a_module_that_is_put_in_later_and_draws_is_seeded():
    net = net_of(nn.Tanh())
    net.losses(X, Y)
    net.model.between = nn.Dropout(0.5)
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        results.append(torch.stack(net.losses(X, Y)).detach())
    assert torch.equal(*results)


def test_buffers_that_are_replaced_are_found_again():
    net = net_of(nn.BatchNorm1d(8))
    schedule = Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    schedule.step(X, Y)
    mean = net.model.between.running_mean = torch.ones(8)
    assert any(buffer is mean for buffer in net.blocks[0].buffers())
    net.engine.loss = lambda output, target: F.cross_entropy(output, target) * float("nan")
    with pytest.raises(NonFiniteLossError):
        schedule.step(X, Y)
    assert net.model.between.running_mean is mean
    assert torch.equal(mean, torch.ones(8))


def test_an_optimizer_with_a_zero_grad_of_its_own_is_asked():
    calls = []

    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)
            super().zero_grad(set_to_none)

    net = net_of(nn.Tanh())
    Greedy(net, lambda parameters: Counting(parameters, lr=0.1)).step(X, Y)
    assert calls == [True, True]
    assert all(parameter.grad is None for parameter in net.parameters())
