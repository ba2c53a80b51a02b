"""Attributes that a forward writes: a graph is right without them, unless they carry a value to the next call."""

import copy
import logging
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import TraceError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop, self.b, self.c = nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Linear(8, 3)
        self.set_up()

    def set_up(self):
        pass

    def middle(self, h):
        return self.b(self.drop(h)).tanh()

    def forward(self, x):
        return self.c(self.middle(self.a(x).tanh()))


class Feature(Base):
    """Written, and read again in the same forward, by another module too."""

    def set_up(self):
        self.size = None

    def middle(self, h):
        self.feature, self.size = h, h.shape
        self.drop.seen = [h, {"mean": h.mean()}]
        return super().middle(h) + self.feature + self.drop.seen[0]


class ByKey(Base):
    """Kept in containers that are filled anew."""

    def set_up(self):
        self.outs, self.list, self.queue = {}, [], deque()

    def middle(self, h):
        self.outs["h"] = h
        self.list.clear()
        self.list.append(h)
        self.queue.clear()
        self.queue.extend([h, 2 * h])
        return super().middle(h) + self.outs["h"] + sum(self.list) + self.queue[1]


class Anchors(Base):
    """YOLO: made anew when the size changes."""

    def set_up(self):
        self.shape, self.anchors = None, torch.empty(0)

    def middle(self, h):
        if self.shape != h.shape:
            self.anchors, self.shape = torch.arange(8.0) / 8, h.shape
        return super().middle(h) + self.anchors


class Grids(Base):
    """YOLO v5: an item of a list, in evaluation alone."""

    def set_up(self):
        self.grid = [torch.empty(0)] * 2

    def middle(self, h):
        if self.training:
            return super().middle(h)
        if self.grid[1].shape != h.shape[1:]:
            self.grid[1] = torch.arange(8.0)
        return super().middle(h) + self.grid[1]


class Angles(Base):
    """Rotary embeddings: made at the first call, and its size noted."""

    def set_up(self):
        self.length, self.cos, self.sin = 0, None, None

    def middle(self, h):
        if h.shape[1] > self.length:
            self.length, self.cos = h.shape[1], torch.arange(float(h.shape[1])).cos()
        if self.sin is None:
            self.sin = torch.arange(8.0).sin()
        return super().middle(h * self.cos) + self.sin


class Bias(Base):
    """LeViT: made of parameters, kept in evaluation, and dropped when training goes on."""

    def set_up(self):
        self.cache = {}

    def train(self, mode=True):
        if mode:
            self.cache = {}
        return super().train(mode)

    def middle(self, h):
        if self.training:
            return super().middle(h) + self.b.bias[[1, 0, 2, 3, 4, 5, 6, 7]]
        key = str(h.device)
        if key not in self.cache:
            self.cache[key] = self.b.bias[[1, 0, 2, 3, 4, 5, 6, 7]]
        return super().middle(h) + self.cache[key]


@pytest.mark.parametrize(
    ("kind", "front_end", "names"),
    [
        (Bias, "symbolic", ["cache.cpu"]),
        (Feature, "symbolic", ["feature", "size", "drop.seen"]),
        (ByKey, "symbolic", ["outs.h", "list.0", "queue.0", "queue.1"]),
        (Anchors, "export", ["anchors", "shape"]),
        (Grids, "export", ["grid.1"]),
        (Angles, "export", ["length", "cos", "sin"]),
    ],
)
def test_the_net_is_the_model(kind, front_end, names, caplog):
    model = kind()
    before = set(vars(model)), set(vars(model.drop))
    with caplog.at_level(logging.WARNING, "sedona_fx"):
        one = sedona_fx.decouple(model, (X, Y), blocks=1)
    assert one.capture.front_end == front_end
    assert one.capture.free_batch
    (told,) = [record.getMessage() for record in caplog.records if "writes the attributes" in record.getMessage()]
    assert all(repr(name) in told for name in names)
    assert (set(vars(model)), set(vars(model.drop))) == before
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "drop"], heads="linear")
    twin = copy.deepcopy(model)
    for step, rows in enumerate((6, 3, 6)):
        for module in (twin, one.model):
            module.zero_grad()
            torch.manual_seed(step)
            if module is twin:
                loss = F.cross_entropy(twin.train()(X[:rows]), Y[:rows])
                loss.backward()
            else:
                assert torch.equal(one.train().backward(X[:rows], Y[:rows]).losses[0], loss)
        for ours, theirs in zip(one.model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(net.eval()(X[:rows]), twin.eval()(X[:rows]))
    net.model.drop.p = 0.0
    twin = copy.deepcopy(net.model)
    net = sedona_fx.decouple(twin, (X, Y), cuts=["a"], heads="linear")
    net.backward(X, Y)
    h = twin.a(X).detach()
    F.cross_entropy(twin.c(twin.middle(h.tanh())), Y).backward()
    for name in ("b.weight", "c.weight"):
        torch.testing.assert_close(net.model.get_parameter(name).grad, twin.get_parameter(name).grad)


class Counter(Base):
    def set_up(self):
        self.calls = 0

    def middle(self, h):
        self.calls += 1
        return super().middle(h)


class State(Base):
    """A state that the next call reads."""

    def set_up(self):
        self.state = None

    def middle(self, h):
        h = h if self.state is None else h + self.state
        self.state = h.detach().mean(0)
        return super().middle(h)


class Average(State):
    """Nobody reads it, but it goes on from call to call."""

    def middle(self, h):
        self.state = h.detach().mean() if self.state is None else 0.9 * self.state + h.detach().mean()
        return Base.middle(self, h)


class Diary(Base):
    def set_up(self):
        self.seen = []

    def middle(self, h):
        self.seen.append(h.shape[0])
        return super().middle(h)


class FirstWeights(Base):
    """Keeps what it made of the weights of the first call."""

    def set_up(self):
        self.weight = None

    def middle(self, h):
        if self.weight is None:
            self.weight = self.b.weight.detach().abs().mean()
        return super().middle(h) / self.weight


class StaleBias(Bias):
    """Goes on with what it made of earlier parameters."""

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class FirstNumbers(FirstWeights):
    """Keeps what it made of the first batch."""

    def middle(self, h):
        if self.weight is None:
            self.weight = h.detach().abs().mean()
        return Base.middle(self, h) / self.weight


@pytest.mark.parametrize("kind", [Counter, State, Average, Diary, FirstWeights, StaleBias, FirstNumbers])
def test_what_the_next_call_would_find_is_refused(kind):
    name = {StaleBias: "cache.", Counter: "calls", Diary: "seen.0", FirstWeights: "weight", FirstNumbers: "weight"}.get(
        kind, "state"
    )
    model = kind()
    before = copy.deepcopy(vars(model)[name.partition(".")[0]])
    with pytest.raises(TraceError, match=rf"the attribute '{name}.*test_attributes.py line \d+"):
        sedona_fx.decouple(model, (X, Y), blocks=1)
    assert vars(model)[name.partition(".")[0]] == before
