"""Derivatives in forward: never cut apart, right in every block and under every grad mode, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, SettingsError, TraceError

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
        for gradient in torch.autograd.grad(out, [h], grad_outputs=torch.ones_like(out), create_graph=True):
            h = h + gradient
        return h


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
        sedona_fx.decouple(model, (X, target), loss=loss, blocks=2, search="uniform", heads=False)
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


@pytest.mark.parametrize(
    "search",
    [
        "guided",
        sedona_fx.search.Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=2),
        sedona_fx.search.Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=1),
        sedona_fx.search.Rollout(steps=2),
    ],
    ids=["guided", "unrolled", "sedona", "rollout"],
)
def test_searches_leave_a_stretch_whole(search):
    data = [(X, Y), (X.flip(0), Y.flip(0)), (X.sin(), Y), (X.cos(), Y)]
    net = sedona_fx.decouple(Model(Force), data, blocks=3, search=search, heads=["linear", "mlp-sr"], progress=False)
    assert not any(cut.startswith("middle.") for cut in net.plan.cuts)


class Images(nn.Module):
    """Convolutions and norms, whose second derivatives a search replaces by forms that have no third one."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.Tanh())
        self.c = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.d = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = self.a(x)
        h = h + torch.autograd.grad(self.b(h).square().sum(), h, create_graph=True)[0]
        return self.d(self.c(h).mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.Identity()], ids=["norm", "none"])
@pytest.mark.parametrize("unroll", [1, 2])
def test_hypergradients_through_a_derivative(unroll, norm):
    images = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = [(images, Y), (images.flip(0), Y.flip(0)), (images.sin(), Y), (images.cos(), Y)]
    search = sedona_fx.search.Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=unroll)
    options = {"blocks": 2, "search": search, "heads": ["linear", "sedona-1"], "progress": False}
    if unroll == 2 and isinstance(norm, nn.BatchNorm2d):  # PyTorch has two derivatives of it, and no more
        with pytest.raises(SettingsError, match=r"three times, as the model takes.*batch_norm.*search='guided'"):
            sedona_fx.decouple(Images(norm), data, **options)
        return
    net = sedona_fx.decouple(Images(norm), data, **options)
    assert net.plan.provenance["search"] == "sedona"


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


class Transform(Middle):
    def forward(self, h):
        return torch.func.grad(self.energy_of)(h)


class PerExample(Middle):
    def forward(self, h):
        return torch.vmap(torch.func.grad(self.energy_of))(h)


class Mapped(Middle):
    def forward(self, h):
        return torch.vmap(lambda row: self.two(self.one(row)) * row.sum())(h)


class Jacobian(Middle):
    def forward(self, h):
        return torch.vmap(torch.func.jacrev(lambda row: self.two(self.one(row))))(h).sum(1)


class Pulled(Middle):
    def forward(self, h):
        out, pull = torch.func.vjp(lambda h: self.two(self.one(h)), h)
        return pull(out)[0]


class Pushed(Middle):
    def forward(self, h):
        return torch.func.jvp(lambda h: self.two(self.one(h)), (h,), (h.cos(),))[1]


class Functional(Middle):
    def forward(self, h):
        return torch.autograd.functional.vjp(lambda h: self.two(self.one(h)), h, h.cos(), create_graph=True)[1]


class Ensemble(Middle):
    """One layer with several weights at once."""

    def forward(self, h):
        layer = self.one[0]
        weights = {"weight": torch.stack([layer.weight, self.two[0].weight]), "bias": torch.stack([layer.bias] * 2)}
        outs = torch.vmap(lambda w, x: torch.func.functional_call(layer, w, (x,)), in_dims=(0, None))(weights, h)
        return outs.mean(0).tanh()


WHOLE = (CallsBackward, CallsFunction, Transform, PerExample, Mapped, Jacobian, Pulled, Pushed, Functional, Ensemble)


class Asks(Model):
    """A model that symbolic tracing cannot record."""

    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("four features")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # forward mode uses it
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("model_class", [Model, Asks])
@pytest.mark.parametrize("kind", [*WHOLE, Force])
def test_what_no_graph_can_hold_stays_whole(kind, model_class, named, caplog):
    """The innermost module whose code it is becomes one node; cuts around it have the values of blocks by hand."""
    model = model_class(kind)
    options = {"leaf_modules": ["middle"]} if named else {}
    net = sedona_fx.decouple(model, (X, Y), cuts=["b", "middle"], heads="linear", **options)
    assert net.plan.capture.front_end == ("export" if model_class is Asks else "symbolic")
    assert not gradients(model)
    assert not gradients(net.model)
    told = [record.getMessage() for record in caplog.records if "'middle' stays whole" in record.getMessage()]
    assert bool(told) == (not named and not (kind is Force and model_class is Model))
    assert all(f"{__file__} line" in text for text in told)
    twin, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    first = F.cross_entropy(heads["0"](h := twin.b(twin.a(X))), Y)
    first.backward()
    h = h.detach().requires_grad_(kind is Force)
    second = F.cross_entropy(heads["1"](h := twin.middle(h)), Y)
    second.backward()
    third = F.cross_entropy(twin.d(twin.c(h.detach())), Y)
    third.backward()
    found = net.backward(X, Y).losses
    torch.testing.assert_close(found, [first.detach(), second.detach(), third.detach()], rtol=1e-12, atol=0)
    assert_same(gradients(net.model), gradients(twin), 1e-12)
    torch.testing.assert_close(net.eval()(X), model.eval()(X), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("kind", WHOLE)
def test_one_block_with_a_whole_module_is_the_model(kind):
    model = Model(kind)
    net = sedona_fx.decouple(model, (X, Y), blocks=1)
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    assert_same(gradients(net.model), gradients(model), 0.0)


class Bare(nn.Module):
    """The code of a part, as the model's own."""

    def __init__(self, part):
        super().__init__()
        self.a, self.one, self.two, self.energy = layer(4), layer(8), layer(8), nn.Linear(8, 3)
        self.part = part
        self.double()

    def energy_of(self, h):
        return self.energy(self.two(self.one(h))).pow(2).sum()

    def forward(self, x):
        return self.energy(self.part.forward(self, self.a(x)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
@pytest.mark.parametrize("kind", WHOLE)
def test_in_the_models_own_forward_it_is_refused_by_name(kind):
    what = {CallsBackward: r"calls backward\(\)", CallsFunction: r"calls backward\(\)", Transform: r"torch\.func\.grad"}
    what |= {Pulled: r"torch\.func\.vjp", Pushed: r"torch\.func\.jvp", Functional: r"torch\.autograd\.functional\.vjp"}
    place = rf"the model's own forward, {__file__} line \d+: `.*{what.get(kind, 'torch.vmap')}.*module of their own"
    with pytest.raises(TraceError, match=place):
        sedona_fx.decouple(Bare(kind), (X, Y), blocks=2, search="balanced")
    assert torch.equal(torch.vmap(torch.sin)(X), X.sin())  # nothing is left behind in the interpreter
    assert torch.func.jvp(torch.sin, (X,), (X,))[1].isfinite().all()


class Low(Middle):
    """A derivative inside of an autocast region, whose layers are used again there."""

    def forward(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            leaf = h.float()
            (slope,) = torch.autograd.grad(self.energy_of(leaf).float().sum(), leaf, create_graph=True)
            return (slope + self.one(h).float()).to(h.dtype)


def test_a_derivative_is_in_the_same_autocast_region_as_what_is_around_it():
    """A second region would cast the weights anew, and sum their gradients in another way."""
    model = Model(Low).float()
    x = X.float().requires_grad_()
    net = sedona_fx.decouple(model, (X.float(), Y), blocks=1)
    net.backward(X.float(), Y)
    F.cross_entropy(model(x), Y).backward()
    for (name, p), q in zip(net.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


class Hooking(nn.Module):
    """Registers a hook in its forward, and calls torch.func, for which it is run twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, h):
        self.layer.weight.register_hook(lambda gradient: gradient)
        slope = torch.func.vmap(torch.func.grad(lambda row: self.layer(row).square().sum()))
        return self.layer(h) + slope(h)


def test_hooks_of_a_forward_that_is_run_to_see_what_it_keeps_are_removed():
    net = sedona_fx.decouple(Model(Hooking), (X, Y), blocks=1, leaf_modules=["middle"])
    assert not net.model.middle.layer.weight._backward_hooks
