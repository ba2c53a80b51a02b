"""TorchScript inside a model: scripted and traced modules stay whole, scripted functions become one node each."""

import copy
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.capture.whole.scripted import _as_function

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="PyTorch supports no TorchScript there"),
]


def scripted(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(thing)


def traced(module, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, inputs)


class Inner(nn.Module):
    """Code that TorchScript keeps as a branch; with statistics."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.linear(h))
        if bool(h.sum() > 1e6):
            h = h * 2
        return h.tanh()


def swish(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(factor * x)


class Model(nn.Module):
    def __init__(self, middle, activation=torch.tanh):
        super().__init__()
        self.a, self.middle, self.c, self.d = nn.Linear(4, 8), middle, nn.Linear(8, 8), nn.Linear(8, 3)
        self.activation = activation
        self.double()

    def forward(self, x):
        h = self.middle(self.activation(self.a(x)))
        return self.d(self.activation(self.c(h)))


def made(kind):
    torch.manual_seed(0)
    if kind == "function":
        return Model(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), scripted(swish))
    inner = Inner().double()
    return Model(scripted(inner) if kind == "scripted" else traced(inner, torch.randn(2, 8, dtype=torch.float64)))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_one_block_is_the_model(kind):
    model = made(kind)
    before = copy.deepcopy(model.state_dict())
    net = sedona_fx.decouple(model, (X, Y), blocks=1)
    assert net.plan.capture.front_end == "symbolic"
    for name, value in net.original_state_dict().items():
        assert torch.equal(value, before[name]), name
    for _ in range(3):
        model.zero_grad()
        net.zero_grad()
        net.backward(X, Y)
        F.cross_entropy(model(X), Y).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(net.model.get_buffer(name), buffer, rtol=1e-12, atol=0)
    torch.testing.assert_close(net.eval()(X), model.eval()(X), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_blocks_around_a_scripted_module(kind):
    model = made(kind)
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "middle"], heads="linear")
    assert not any(place.startswith("middle.") for place in net.plan.base_layers)
    twin, heads = made(kind), copy.deepcopy(net.heads)  # copy.deepcopy gives scripted parameters of the original
    F.cross_entropy(heads["0"](h := twin.a(X)), Y).backward()
    F.cross_entropy(heads["1"](h := twin.middle(h.detach().tanh())), Y).backward()
    F.cross_entropy(twin.d(twin.c(h.detach()).tanh()), Y).backward()
    net.backward(X, Y)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14)
    assert gradients(net.model).keys() == gradients(twin).keys()


def test_scripted_functions_are_nodes():
    model = made("function")
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "middle.0"], heads="linear")
    assert net.plan.capture.front_end == "symbolic"
    torch.testing.assert_close(net.eval()(X), model.eval()(X), rtol=1e-12, atol=0)
    twin, heads = copy.deepcopy(model.train()), copy.deepcopy(net.heads)
    F.cross_entropy(heads["0"](h := twin.a(X)), Y).backward()
    F.cross_entropy(heads["1"](h := twin.middle[0](swish(h.detach()))), Y).backward()
    h = twin.middle[1](h.detach()).tanh()
    F.cross_entropy(twin.d(swish(twin.c(h))), Y).backward()
    net.train().backward(X, Y)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def test_the_net_owns_its_copy(tmp_path):
    """Copies of copies, files, and a shared model: nothing leads back to the user's own."""
    model = made("scripted")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "middle"], heads="linear")
    twin = copy.deepcopy(net)
    for one in (net, twin):
        schedule = sedona_fx.train.Greedy(one, sgd)
        losses = [schedule.step(X, Y).losses for _ in range(4)]
        assert losses[-1][1] < losses[0][1]
        assert not torch.equal(one.model.middle.linear.weight, before["middle.linear.weight"])
    for name, value in net.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    assert not gradients(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, made("scripted"), data=(X, Y))
    torch.testing.assert_close(again.eval()(X), net.eval()(X), rtol=1e-12, atol=0)


def test_a_shared_model_and_tied_weights():
    model = made("scripted")
    model.c.weight = model.middle.linear.weight
    net = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
    assert net.model.c.weight is net.model.middle.linear.weight
    assert net.model.c.weight is not model.c.weight
    shared = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear", inplace=True)
    assert shared.model.middle.linear.weight is model.middle.linear.weight is shared.model.c.weight
    shared.backward(X, Y)
    assert model.middle.linear.weight.grad is not None


@pytest.mark.parametrize("schedule", ["Backprop", "BackLink", "Replay", "Delayed", "Current"])
def test_every_way_to_train(schedule):
    train = sedona_fx.train
    options = {"Replay": {"capacity": 2}, "BackLink": {"reach": 1}, "Current": {"weights": "current"}}.get(schedule, {})
    net = sedona_fx.decouple(made("scripted"), (X, Y), cuts=["a", "middle"], heads="linear")
    trained = getattr(train, schedule.replace("Current", "Delayed"))(net, sgd, **options)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    for _ in range(5):
        assert all(loss.isfinite() for loss in trained.step(X, Y).losses)
    assert all(not torch.equal(p, before[name]) for name, p in net.model.named_parameters())


def test_a_search_over_it():
    data = [(X, Y), (X.flip(0), Y.flip(0)), (X.sin(), Y), (X.cos(), Y)]
    search = sedona_fx.search.Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=2)
    net = sedona_fx.decouple(made("traced"), data, blocks=2, search=search, heads=["linear"], progress=False)
    assert net.plan.cuts[0] in ("a", ":tanh", "middle")


def test_a_model_that_is_scripted_itself():
    with pytest.raises(sedona_fx.errors.DataError, match=r"TorchScript.*nn\.Module that it was made of"):
        sedona_fx.decouple(scripted(Inner()), (torch.randn(4, 8), Y[:4]), blocks=1)


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h

    @torch.jit.export
    def squashed(self, h: torch.Tensor) -> torch.Tensor:
        return self.linear(h).tanh()


class Method(nn.Module):
    """Calls a method of a scripted module, and not the module."""

    def __init__(self):
        super().__init__()
        self.a, self.helper, self.d = nn.Linear(4, 8), scripted(Helper()), nn.Linear(8, 3)

    def forward(self, x):
        return self.d(self.helper.squashed(self.a(x)))


@pytest.mark.parametrize("inside", [False, True])
def test_a_method_of_a_scripted_module(inside):
    """A node would hide whose weights it reads: its weights train, by the other front end or in a whole module."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Method(), nn.Tanh()).double() if inside else Method().double()
    net = sedona_fx.decouple(model, (X, Y), blocks=1)
    torch.testing.assert_close(net(X), model(X), rtol=1e-12, atol=0)
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    assert gradients(net.model).keys() == gradients(model).keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_functions_live_no_longer_than_their_graphs():
    function = scripted(doubled)
    one, two = _as_function(function), _as_function(function)
    assert one is two
    known = weakref.ref(one)
    del one, two
    assert known() is None
