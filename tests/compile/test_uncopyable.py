"""Models that ``copy.deepcopy`` does not copy: copied, shared where that is right, or refused by the place."""

import copy
import threading
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import DataError, TraceError
from sedona_fx.search import Guided, Search, Sedona

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.set_up()

    def set_up(self):
        pass

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())


class Counting:
    """A hook with a lock and an open file."""

    def __init__(self, file):
        self.lock, self.file, self.calls = threading.Lock(), file, 0

    def __call__(self, module, inputs, output):
        with self.lock:
            self.calls += 1


class Hooked(Base):
    def set_up(self):
        self.b.register_forward_hook(Counting(open(__file__)))  # noqa: SIM115


class Weight(Base):
    """Its weight is a tensor with a graph, computed anew by a hook of PyTorch's."""

    def set_up(self):
        with pytest.warns(FutureWarning):
            self.b = nn.utils.weight_norm(nn.Linear(8, 8))


class Captured(Weight):
    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("four features")
        return super().forward(x)


class Odds(Base):
    """Locks, Python modules and what an earlier call left, in containers too."""

    def set_up(self):
        self.lock, self.numpy, self.last = threading.RLock(), np, [self.a.weight.sum(), {"norm": self.c.weight.norm()}]


class NoCopy:
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


class Holds(Base):
    def set_up(self):
        self.b.held = {"one": [NoCopy()]}


class Iterates(Base):
    def set_up(self):
        self.b.held = (k for k in range(10))


class Single(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


class HoldsModule(Base):
    def set_up(self):
        self.b = Single(8, 8)


def check(model, inplace):
    with torch.random.fork_rng():
        expected = Base.__call__(model, X)
        net = sedona_fx.decouple(model, (X, Y), blocks=1, inplace=inplace)
        F.cross_entropy(expected, Y).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        for _ in range(2):
            net.model.zero_grad()
            net.backward(X, Y)
            assert all(torch.equal(p.grad, gradients[name]) for name, p in net.model.named_parameters())
        model.zero_grad()
        assert torch.equal(net(X), expected)
        assert torch.equal(net.inference_module()(X), expected)
        assert any(p is q for p in net.parameters() for q in model.parameters()) == inplace
        cut = sedona_fx.decouple(model, (X, Y), cuts=["a", "b"], heads="linear", inplace=inplace)
        twin = cut.model
        heads = copy.deepcopy(cut.heads)
        F.cross_entropy(heads["0"](h := twin.a(X)), Y).backward()
        F.cross_entropy(heads["1"](h := twin.b(h.detach().tanh())), Y).backward()
        F.cross_entropy(twin.c(h.detach().tanh()), Y).backward()
        gradients = {name: p.grad.clone() for name, p in twin.named_parameters()}
        twin.zero_grad()
        cut.backward(X, Y)
        assert all(torch.allclose(p.grad, gradients[name]) for name, p in twin.named_parameters())
        twin.zero_grad()
    return net


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("kind", [Weight, Captured, Hooked, Odds])
def test_the_copy_is_the_model(kind, inplace):
    model = kind()
    net = check(model, inplace)
    if kind is Hooked:
        (ours,), (theirs,) = (m.b._forward_hooks.values() for m in (net.model, model))
        assert ours is not theirs
        assert (ours.lock, ours.file) == (theirs.lock, theirs.file)
        theirs.file.close()
    if kind is Odds:
        assert net.model.last[0] is not model.last[0]
        assert model.last[0].requires_grad


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Holds, r"'b.held' of Holds, a dict, cannot be copied \(RuntimeError: there is one of me\).*inplace=True"),
        (Iterates, r"'b.held' of Iterates, a generator, cannot be copied.*inplace=True"),
        (HoldsModule, r"'b' of HoldsModule, a Single, cannot be copied"),
    ],
)
def test_what_refuses_to_be_copied_is_named_and_shared_in_place(kind, what):
    with pytest.raises(DataError, match=what):
        sedona_fx.decouple(kind(), (X, Y), blocks=1)
    check(kind(), inplace=True)


class Refusal(NamedTuple):
    search: Search
    message: str


SEARCHES = [
    Refusal(Guided(training_steps=20, states=2, finalists=2, batch_size=3), "b', a Single, cannot be copied.*stay as"),
    Refusal(Sedona(warmup_steps=4, meta_steps=1), ""),  # it trains tensors of its own in the place of parameters
]


@pytest.mark.parametrize(("search", "message"), SEARCHES)
def test_no_search_trains_parameters_that_cannot_be_copied(search, message):
    model = HoldsModule()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(DataError, match=message) if message else nullcontext():
        sedona_fx.decouple(model, [(X, Y)] * 4, blocks=2, search=search, inplace=True, leaf_modules=["b"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Reads(Base):
    def set_up(self):
        self.scales = {"b": self.a.weight.mean()}

    def forward(self, x):
        return super().forward(x) * self.scales["b"]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_computed_tensor_that_is_read_is_refused(inplace):
    with pytest.raises(
        TraceError, match=r"the forward of Reads reads the attribute 'scales.b', a tensor that was comp"
    ):
        sedona_fx.decouple(Reads(), (X, Y), blocks=1, inplace=inplace)


class Raises(Base):
    """Reads a computed tensor, and does not take NaN in it."""

    def set_up(self):
        self.b = Leaf()


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))
        self.scale = 2 * self.w

    def forward(self, h):
        if not torch.isfinite(self.scale).all():
            raise ValueError("not finite")
        return h * self.scale


class Zero(Base):
    """Reads a computed tensor, and returns zeros today."""

    def set_up(self):
        self.w = nn.Parameter(torch.randn(3))
        self.scale = 2 * self.w
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("kind", [Raises, Zero])
def test_a_computed_tensor_that_is_read_is_refused_whatever_nan_does_in_it(kind):
    with pytest.raises(TraceError, match=r"reads the attribute '(b\.)?scale', a tensor that was computed before"):
        sedona_fx.decouple(kind(), (X, Y), blocks=1)
