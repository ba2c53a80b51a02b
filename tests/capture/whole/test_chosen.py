"""Modules that stay whole by themselves: Python code that decides by numbers, in tensors or drawn, in every step."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, TraceError

X = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Model(nn.Module):
    """Layers around a part."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.part, self.b, self.c = nn.Linear(4, 8), part(), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def part_of(self, h):
        return self.part(h)

    def forward(self, x):
        return self.c(self.b(self.part_of(self.a(x).tanh())).tanh().mean(1))


class Captured(Model):
    """Needs torch.export."""

    def forward(self, x):
        if x.shape[2] != 4:
            raise ValueError("four features")
        return super().forward(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h):
        return h + self.linear(h).tanh()


class Finite(Layer):
    """DETR's layers."""

    def forward(self, h):
        h = super().forward(h)
        if not torch.isfinite(h).all():
            h = h.clamp(-1e3, 1e3)
        return h


class Longest(Layer):
    def forward(self, h):
        longest = int((h[..., 0] > 0).sum(1).max())
        return super().forward(h) * (torch.arange(h.shape[1]) < longest)[:, None]


class LayerDrop(nn.Module):
    """Leaves out layers, by Python's numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, h):
        for layer in self.layers:
            if self.training and random.random() < 0.4:
                continue
            h = layer(h)
        return h


class TimeMask(Layer):
    """SpecAugment: NumPy says where, a learned vector takes the place."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(8))

    def forward(self, h):
        if self.training:
            where = torch.from_numpy(np.random.rand(*h.shape[:2]) < 0.3)
            h = torch.where(where[..., None], self.embed, h)
        return super().forward(h)


class TensorCoin(Layer):
    def forward(self, h):
        return super().forward(h) if not self.training or torch.rand(()) < 0.5 else h


class OwnStreams(Layer):
    """Draws from generators of its own, and seldom does anything with what it draws."""

    def __init__(self):
        super().__init__()
        self.numpy, self.python = np.random.default_rng(3), [random.Random(4)]

    def forward(self, h):
        if self.training and self.numpy.random() < 0.1:
            return h
        return super().forward(h) * (2 if self.training and self.python[0].random() < 0.1 else 1)


PARTS = [Finite, Longest, LayerDrop, TimeMask, TensorCoin, OwnStreams]


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", [Model, Captured])
def test_one_block_is_the_model_in_every_step(kind, part, caplog):
    model = kind(part)
    with caplog.at_level(logging.WARNING, "sedona_fx"):
        net = sedona_fx.decouple(model, (X, Y), blocks=1)
    assert net.capture.front_end == ("export" if kind is Captured else "symbolic")
    assert net.capture.free_batch
    told = [record.getMessage() for record in caplog.records if "'part' stays whole" in record.getMessage()]
    assert len(told) == 1
    assert "test_chosen.py line" in told[0]
    for step in range(6):
        for module in (model, net.model):
            module.zero_grad()
            seed(step)
            if module is model:
                expected = F.cross_entropy(model.train()(X[: 6 - step % 2]), Y[: 6 - step % 2])
                expected.backward()
            else:
                losses = net.train().backward(X[: 6 - step % 2], Y[: 6 - step % 2]).losses
        assert torch.equal(losses[0], expected)
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, gradient in ({**zeros, **gradients(model)}).items():
            assert torch.equal(({**zeros, **gradients(net.model)})[name], gradient), name
    assert torch.equal(net.eval()(X[:2]), model.eval()(X[:2]))


@pytest.mark.parametrize("part", [Finite, LayerDrop, TimeMask])
def test_blocks_are_those_by_hand_and_draw_by_their_own_seeds(part):
    """Python's and NumPy's numbers as PyTorch's: by seed, block and step, whatever else has drawn."""
    model = Model(part)
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "part"], heads="linear")
    twin, heads = copy.deepcopy(model).train(), copy.deepcopy(net.heads)

    def drawing(block):
        number = sedona_fx.train.block_seed(0, block, 0)
        seed(number % 2**32)
        torch.manual_seed(number), random.seed(number)

    seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()
    net.train().backward(X, Y)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    drawing(0)
    F.cross_entropy(heads["0"](h := twin.a(X)), Y).backward()
    drawing(1)
    F.cross_entropy(heads["1"](h := twin.part(h.detach().tanh())), Y).backward()
    F.cross_entropy(twin.c(twin.b(h.detach()).tanh().mean(1)), Y).backward()
    assert gradients(net.model).keys() == gradients(twin).keys()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.layers, self.c = nn.Linear(4, 8), nn.ModuleList(Finite() for _ in range(4)), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        h = self.a(x)
        for layer in self.layers:
            h = layer(h)
        return self.c(h.mean(1))


def test_two_of_a_class_are_all_of_it(caplog):
    with caplog.at_level(logging.WARNING, "sedona_fx"):
        net = sedona_fx.decouple(Stack(), (X, Y), blocks=4, search="uniform")
    told = [record.getMessage() for record in caplog.records if "whole" in record.getMessage()]
    assert [text.split(" stay")[0] for text in told] == ["'layers.0'", "'layers.1', 'layers.2', 'layers.3'"]
    assert net.plan.cuts == ("a", "layers.0", "layers.1")


def test_too_few_places_name_what_stays_whole():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Model(LayerDrop).part

        def forward(self, x):
            return self.part(x) if random.random() < 2 else x

    model = nn.Sequential(nn.Linear(4, 8), Backbone(), nn.Flatten(), nn.Linear(40, 3)).double()
    with pytest.raises(
        CutError, match=r"'1' stays whole.*`return self.part\(x\) if random.random.*Put these lines into"
    ):
        sedona_fx.decouple(model, (X, Y), blocks=6, search="uniform")


class Own(Model):
    def part_of(self, h):
        return self.part(h) if random.random() < 0.5 else h


class OwnNumber(Model):
    def part_of(self, h):
        return self.part(h) if bool(torch.isfinite(h).all()) else h


@pytest.mark.parametrize(("kind", "line"), [(Own, "if random.random"), (OwnNumber, "if bool")])
def test_the_models_own_forward_is_refused_with_its_line(kind, line):
    with pytest.raises(
        TraceError, match=rf"test_chosen.py line \d+: `return self.part\(h\) {line}.*a module of their own"
    ):
        sedona_fx.decouple(kind(Layer), (X, Y), blocks=1)
