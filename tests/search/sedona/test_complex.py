"""Complex numbers in a net that is searched: hypergradients against differences, and no head on complex activations."""

import copy

import pytest
import torch
from shared_net import central_difference
from test_relaxed_net import problem_of
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, HeadError
from sedona_fx.search import Sedona
from sedona_fx.search.relaxed.hypergradient import hypergradient, validation_loss
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.second_order import ShortSecondDerivatives
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.sedona.relaxed_net import relaxed_blocks

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
Y = torch.tensor([0, 1, 2, 0])


def images(seed, dtype=torch.float64):
    return torch.randn(4, 2, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Wave(nn.Module):
    """A complex convolution between real activations."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, dtype=torch.complex128)

    def forward(self, x):
        z = self.conv(torch.complex(x, 0.3 * x))
        return (z * z.conj()).real.sqrt() + z.imag


class Phases(nn.Module):
    """A complex stream that passes every cut beside a real one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3, padding=1, dtype=torch.complex128) for _ in range(3))
        self.one, self.two = (nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64) for _ in range(2))
        self.fc = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x):
        z = self.a(torch.complex(x, x.sin()))
        h = self.one(z.real + z.imag.tanh())
        z = self.b(z * h)
        h = self.two((z.abs() + h).tanh())
        z = self.c(z + h)
        return self.fc((z.abs() + h).mean((2, 3)))


def waves():
    return nn.Sequential(
        Wave(2, 3), Wave(3, 3), Wave(3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3, dtype=torch.float64)
    )


def relaxed(kind):
    torch.manual_seed(0)
    problem = problem_of(kind(), (images(0), Y), ["linear", "sedona-1"])
    places = problem.places()
    blocks = relaxed_blocks(problem, places)
    net = RelaxedNet(blocks, lambda _, output, target: F.cross_entropy(output, target))
    alpha = torch.randn(len(places), 2, dtype=torch.float64)
    logits = Logits(alpha, [torch.randn(2, dtype=torch.float64) for _ in places])
    return net, State.of(blocks), logits, blocks[0].inputs[0]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", [waves, Phases])
def test_hypergradient(kind, steps):
    net, state, logits, name = relaxed(kind)
    train, val = [({name: images(k)}, Y) for k in range(1, steps + 1)], ({name: images(9)}, Y.flip(0))
    found = [hypergradient(net, state, logits, train, val, **SGD)]
    if steps == 1:
        found.append(one_step_hypergradient(net, state, logits, train[0], val, **SGD))

    def value():
        stepped = state.clone()
        for batch in train:
            grads = relaxed_gradients(net, stepped, logits, batch, create_graph=False).grads
            stepped = sgd_momentum_step(stepped, grads, **SGD, in_place=True)
        return validation_loss(net, stepped, val).item()

    for tensor, name in ((logits.alpha, "alpha"), (logits.beta[0], "beta")):
        wanted = central_difference(value, tensor)
        for result in found:
            got = result.alpha_grad if name == "alpha" else result.beta_grads[0]
            assert wanted.norm() > 1e-6
            assert (got - wanted).norm() <= 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_layers_are_left_to_pytorch(kind):
    torch.manual_seed(0)
    conv = kind(2, 3, 3, dtype=torch.complex128)
    x = torch.randn(2, 2, *[5] * (conv.weight.dim() - 2), dtype=torch.complex128, requires_grad=True)

    def second():
        first = torch.autograd.grad(conv(x).abs().square().sum(), [x, conv.weight], create_graph=True)
        return torch.autograd.grad(sum(g.abs().pow(3).sum() for g in first), [x, conv.weight])

    expected = second()
    with ShortSecondDerivatives():
        for got, wanted in zip(second(), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", [waves, Phases])
@pytest.mark.parametrize("search", [Sedona(warmup_steps=4, meta_steps=3, snapshots=2, unroll=2), "guided", "rollout"])
def test_searches_run(kind, search):
    torch.manual_seed(0)
    data = [(images(k), Y) for k in range(6)]
    net = sedona_fx.decouple(kind(), data, blocks=2, search=search, heads=["linear", "sedona-1"], progress=False)
    schedule = sedona_fx.train.Greedy(net, lambda p: torch.optim.SGD(p, lr=0.01), clip=1.0)
    assert all(loss.isfinite() for loss in schedule.step(*data[0]).losses)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=torch.complex64) for _ in range(3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x.to(torch.complex64)))).abs())


def test_a_cut_at_a_complex_activation():
    """No built-in head reads complex numbers; blocks without heads, and heads of one's own, may end there."""
    x = torch.randn(4, 4)
    torch.manual_seed(0)
    model = Complex()
    for heads in (None, "linear"):
        with pytest.raises(
            HeadError, match=r"no built-in head reads complex numbers, and the activation behind 'a' is"
        ):
            sedona_fx.decouple(model, (x, Y), cuts=["a"], heads=heads)
        assert sedona_fx.decouple(model, (x, Y), blocks=2, search="balanced", heads=heads).plan.cuts == (":abs",)
        with pytest.raises(CutError):
            sedona_fx.decouple(model, (x, Y), blocks=3, search="balanced", heads=heads)
    net = sedona_fx.decouple(model, (x, Y), cuts=["a", "b"], heads=False)
    twin = copy.deepcopy(model)
    schedule = sedona_fx.train.Backprop(net, lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x), Y)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(schedule.step(x, Y).losses[0], loss.detach())

    def head(context):
        return nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), Magnitude())

    net = sedona_fx.decouple(model, (x, Y), cuts=["a", "b"], heads=head)
    heads = copy.deepcopy(net.heads)
    F.cross_entropy(heads["0"](h := model.a(x.to(torch.complex64))), Y).backward()
    F.cross_entropy(heads["1"](h := model.b(h.detach())), Y).backward()
    F.cross_entropy(model.fc(model.c(h.detach()).abs()), Y).backward()
    net.backward(x, Y)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).grad, parameter.grad)


class Magnitude(nn.Module):
    def forward(self, z):
        return z.abs()
