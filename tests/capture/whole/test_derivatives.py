"""Derivatives in forward: never cut apart, right in every block and under every grad mode, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, TraceError

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def layer(inputs, outputs=8):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


class Model(nn.Module):
    """Two layers, `middle`, which takes a derivative, two more layers."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.middle = layer(4), layer(8), middle()
        self.c, self.d = layer(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.d(self.c(self.middle(self.b(self.a(x)))))


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.energy = layer(8), layer(8), nn.Linear(8, 1)

    def energy_of(self, h):
        return self.energy(self.two(self.one(h))).pow(2).sum()


class Force(Middle):
    def forward(self, h):
        return torch.autograd.grad(self.energy_of(h), h, create_graph=True)[0]


class OwnLeaf(Middle):
    """By a tensor that the model itself has detached: the layers before get no gradient, but for the sum."""

    def forward(self, h):
        position = h.detach().requires_grad_(True)
        return h + torch.autograd.grad(self.energy_of(position), position, create_graph=True)[0]


class Assigned(Middle):
    def forward(self, h):
        position = h.detach()
        position.requires_grad = True
        (force,) = torch.autograd.grad([self.energy_of(position)], [position], create_graph=True)
        return h - force


class InPlace(Middle):
    def forward(self, h):
        position = h.detach().clone()
        position.requires_grad_()
        energy = self.energy_of(position)
        return h + torch.autograd.grad(energy, position, create_graph=True)[0] * energy


class Unrolled(Middle):
    """Two steps of descent on the energy, each of which is differentiated."""

    def forward(self, h):
        for _ in range(2):
            (force,) = torch.autograd.grad(self.energy_of(h), (h,), create_graph=True)
            h = h - 0.1 * force
        return h


class Twice(Middle):
    """A derivative of a derivative."""

    def forward(self, h):
        first = torch.autograd.grad(self.energy_of(h), h, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), h, create_graph=True)[0]


class OfWeight(Middle):
    """A step of descent on a weight, and the layer with what comes out."""

    def forward(self, h):
        weight = self.one[0].weight
        (step,) = torch.autograd.grad(self.energy_of(h), [weight], create_graph=True)
        return F.linear(h, weight - 0.1 * step).tanh()


class OfTwo(Middle):
    def forward(self, h):
        shift = torch.zeros_like(h).requires_grad_()
        gradients = torch.autograd.grad(self.energy_of(h + shift), {"h": h, "shift": shift}, create_graph=True)
        return sum(gradients.values())


class WithCotangent(Middle):
    def forward(self, h):
        out = self.two(self.one(h))
        parts = [g for g in torch.autograd.grad(out, [h], grad_outputs=torch.ones_like(out), create_graph=True)]
        return parts[0] + h


class Constant(Middle):
    """Without a graph: the derivative is a number to what follows."""

    def forward(self, h):
        direction = torch.autograd.grad(self.energy_of(h), h, retain_graph=True)[0]
        return self.two(self.one(h)) * direction.sign()


class InTraining(Middle):
    def forward(self, h):
        with torch.enable_grad():
            return h + torch.autograd.grad(self.energy_of(h), h, create_graph=self.training)[0]


KINDS = (*(Force, OwnLeaf, Assigned, InPlace, Unrolled, Twice, OfWeight, OfTwo, WithCotangent, Constant, InTraining),)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_is_the_model(kind):
    model = Model(kind)
    net = sedona_fx.decouple(model, (X, Y), blocks=1, search="uniform")
    assert net.plan.capture.front_end == "symbolic"
    assert torch.equal(net(X), model(X))
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    assert_same(gradients(net.model), gradients(model), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_the_gradients_of_blocks_made_by_hand(kind):
    model = Model(kind)
    cuts = ["a", "b", "middle"] if kind is not Constant else ["a", "middle"]
    net = sedona_fx.decouple(model, (X, Y), cuts=cuts, heads="linear")
    places = {name for place in net.plan.base_layers for name in [place] if name.startswith("middle.")}
    assert not places
    twin, heads = copy.deepcopy(model), [copy.deepcopy(net.heads[str(k)]) for k in range(len(cuts))]
    h, wanted = X, []
    for name, part in twin.named_children():
        h = part(h)
        if name in cuts:
            wanted.append(F.cross_entropy(heads[cuts.index(name)](h), Y))
            h = h.detach().requires_grad_()  # as a hand-made block would have it: `middle` differentiates by it
    wanted.append(F.cross_entropy(h, Y))
    for loss in wanted:
        loss.backward()
    torch.testing.assert_close(net.backward(X, Y).losses, wanted, rtol=1e-12, atol=0)
    assert_same(gradients(net.model), gradients(twin), 1e-12)
    with torch.no_grad():  # where PyTorch itself could not run the model
        found = net.eval()(X)
    torch.testing.assert_close(found, model.eval()(X), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_inside_of_the_stretch(kind):
    for cut in ("middle.one", "middle.two"):
        with pytest.raises(CutError, match=r"torch\.autograd\.grad differentiates in 'middle'.*test_derivatives\.py"):
            sedona_fx.decouple(Model(kind), (X, Y), cuts=[cut], heads="linear")


class Energy(nn.Module):
    """Forces of a potential: the whole model is one stretch."""

    def __init__(self, both=False):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.layers = both, nn.Sequential(layer(4), layer(8), layer(8), nn.Linear(8, 1)).double()

    def forward(self, x):
        x = x.detach().requires_grad_(True)
        energy = self.layers(x)
        forces = -torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0]
        return (energy, forces) if self.both else forces


def test_a_model_that_is_one_stretch():
    model, target = Energy(), X.sin()
    for options in ({"blocks": 3, "search": "balanced"}, {"cuts": ["layers.1"]}):
        place = r"in the model's own forward, .*test_derivatives\.py line \d+: `forces = .*blocks=1"
        with pytest.raises(CutError, match=place):
            sedona_fx.decouple(model, (X, target), loss=F.mse_loss, **options)
    net = sedona_fx.decouple(model, (X, target), loss=F.mse_loss, blocks=1)
    schedule = sedona_fx.train.Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = F.mse_loss(model(X), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(schedule.step(X, target).losses[0], loss.detach())
    found = sedona_fx.train.evaluate(net, [(X, target)])["loss"]
    assert found == pytest.approx(F.mse_loss(model.eval()(X), target).item())


def test_energy_and_forces():
    """Two outputs: the loss needs both, and the second is taken in the last block."""
    model = Energy(both=True)
    target = (X.sum(1, keepdim=True), X.sin())

    def loss(output, target):
        return F.mse_loss(output[0], target[0]) + F.mse_loss(output[1], target[1])

    with pytest.raises(CutError, match=r"torch\.autograd\.grad differentiates"):
        sedona_fx.decouple(model, (X, target), loss=loss, blocks=2, heads=False)
    net = sedona_fx.decouple(model, (X, target), loss=loss, blocks=1)
    net.backward(X, target)
    loss(model(X), target).backward()
    assert_same(gradients(net.model), gradients(model), 0.0)


class Penalty(nn.Module):
    """A classifier that also returns how steep it is behind its stem."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = layer(4), layer(8), layer(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        h = self.b(self.a(x))
        out = self.d(self.c(h))
        slope = torch.autograd.grad(out.logsumexp(1).sum(), h, create_graph=True)[0]
        return {"logits": out, "penalty": slope.square().sum(1).mean()}


def test_a_derivative_that_is_no_part_of_the_primary_output():
    model = Penalty()

    def loss(output, target):
        return F.cross_entropy(output["logits"], target) + output.get("penalty", 0.0)

    def local(output, target):
        return F.cross_entropy(output["logits"], target)

    with pytest.raises(CutError, match=r"torch\.autograd\.grad differentiates"):
        sedona_fx.decouple(model, (X, Y), loss=loss, cuts=["c"], heads=False)
    net = sedona_fx.decouple(model, (X, Y), loss=loss, cuts=["a", "b"], heads=False)
    twin = copy.deepcopy(model)
    schedule = sedona_fx.train.Backprop(net, lambda p: torch.optim.SGD(p, lr=0.1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        value = loss(twin(X), Y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        torch.testing.assert_close(schedule.step(X, Y).losses[0], value.detach(), rtol=1e-12, atol=0)
    del local


@pytest.mark.parametrize("search", ["guided", "sedona", "rollout"])
def test_searches_leave_a_stretch_whole(search):
    data = [(X, Y), (X.flip(0), Y.flip(0)), (X.sin(), Y), (X.cos(), Y)]
    net = sedona_fx.decouple(Model(Force), data, blocks=3, search=search, heads=["linear", "mlp-sr"], progress=False)
    assert not any(cut.startswith("middle.") for cut in net.plan.cuts)


class CallsBackward(Middle):
    def forward(self, h):
        position = h.detach().requires_grad_()
        self.energy_of(position).backward()
        return h + position.grad


class CallsFunction(Middle):
    def forward(self, h):
        position = h.detach().requires_grad_()
        torch.autograd.backward(self.energy_of(position))
        return h + position.grad


@pytest.mark.parametrize("kind", [CallsBackward, CallsFunction])
def test_backward_in_forward_needs_a_module_of_its_own(kind):
    model = Model(kind)
    with pytest.raises(TraceError, match=r"middle, .*test_derivatives\.py line \d+.*calls backward\(\).*leaf_modules"):
        sedona_fx.decouple(model, (X, Y), cuts=["b"], heads="linear")
    assert not gradients(model)
    net = sedona_fx.decouple(model, (X, Y), blocks=1, leaf_modules=["middle"])
    assert not gradients(model)
    assert not gradients(net.model)
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    assert_same(gradients(net.model), gradients(model), 0.0)
