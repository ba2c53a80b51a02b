"""Modules that stay whole in programs of torch.export: they run as they are, in every block, mode and batch size."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import TraceError

X = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Model(nn.Module):
    """Tokens; a forward that needs torch.export."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.part, self.b, self.c = nn.Linear(4, 8), part(), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def part_of(self, h):
        return self.part(h)

    def forward(self, x):
        if x.shape[2] != 4:
            raise ValueError("four features")
        return self.c(self.b(self.part_of(self.a(x).tanh())).tanh().mean(1))


class Branches(nn.Module):
    """On numbers, in Python; with dropout and statistics."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.3)

    def forward(self, h):
        h = self.drop(self.norm(self.linear(h)))
        return h.tanh() if h.sum() > -1e6 else h * float("nan")


class Counts(nn.Module):
    """Python state, which no graph has."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.seen = nn.Linear(8, 8), 0, []

    def forward(self, h):
        self.calls += 1
        self.seen.append(h.shape)
        return self.linear(h) / (1 + float(h.abs().max() > 1e6))


class Flat(nn.Module):
    """Rows of all examples at once: as many as examples times tokens."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h):
        rows = self.linear(h.flatten(0, 1))
        return rows if rows.isfinite().all() else rows * 0


class Nested(nn.Module):
    """Several results, some of them no tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pair, *, scale, factors=None):
        h, shift = pair
        out = self.linear(h) * scale + shift
        return {"out": (out, [out.relu()]), "name": "nested", "level": out.detach().abs().amax().item() * 0 + 1.5}


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h):
        out = self.linear(h)
        out[:, 0].mul_(float(out.isfinite().all()))
        return out


class OfFlat(Model):
    def part_of(self, h):
        return self.part(h).view(-1, 5, 8)


class OfNested(Model):
    def part_of(self, h):
        found = self.part((h, 0.5), scale=2.0)
        return found["out"][0] * found["level"] - found["out"][1][0]


class Twice(Model):
    def part_of(self, h):
        return self.part(self.part(h)) + h


CASES = [(Model, Branches), (Twice, Branches), (Model, Counts), (OfFlat, Flat), (OfNested, Nested), (Model, Overwrites)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_one_block_is_the_model(kind, part):
    model = kind(part)
    net = sedona_fx.decouple(model, (X, Y), blocks=1, leaf_modules=["part"])
    assert net.plan.capture.front_end == "export"
    assert net.plan.capture.free_batch
    for module in (model, net):
        torch.manual_seed(3)
        F.cross_entropy(module(X), Y).backward() if module is model else module.backward(X, Y)
    expected = gradients(model)
    assert gradients(net.model).keys() == expected.keys()
    for name, gradient in gradients(net.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    for (name, ours), theirs in zip(net.model.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for size in (1, 2, 5):
        assert torch.equal(net.eval()(X[:size]), model.eval()(X[:size]))


@pytest.mark.parametrize(("kind", "part"), [case for case in CASES if case[0] is not Twice])
def test_blocks_around_it(kind, part):
    model = kind(part)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "b"], heads="linear", leaf_modules=["part"])
    assert not any(place.startswith("part.") for place in net.plan.base_layers)
    twin, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    F.cross_entropy(heads["0"](h := twin.a(X)), Y).backward()
    F.cross_entropy(heads["1"](h := twin.b(twin.part_of(h.detach().tanh()))), Y).backward()
    F.cross_entropy(twin.c(h.detach().tanh().mean(1)), Y).backward()
    net.backward(X, Y)
    assert gradients(net.model).keys() == gradients(twin).keys()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_python_state_is_as_if_nothing_had_been_recorded():
    model = Model(Counts)
    states = torch.get_rng_state()
    net = sedona_fx.decouple(model, (X, Y), blocks=1, leaf_modules=["part"])
    assert torch.equal(states, torch.get_rng_state())
    assert net.model.part.calls == 0
    net(X)
    net(X[:2])
    assert net.model.part.calls == 2
    assert net.model.part.seen == [(6, 5, 8), (2, 5, 8)]
    assert model.part.calls == 0


def test_hooks_on_it_run():
    model, seen = Model(Branches), []
    model.part.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    net = sedona_fx.decouple(model, (X, Y), blocks=1, leaf_modules=["part"])
    seen.clear()
    net(X)
    assert seen == [(6, 5, 8)]


def test_a_part_that_is_replaced_is_called_from_then_on():
    net = sedona_fx.decouple(Model(Counts), (X, Y), blocks=1, leaf_modules=["part"])
    net.model.part = Counts().double()
    assert torch.equal(net.eval()(X), net.model.eval()(X))


class Cropped(nn.Module):
    """As many tokens as a random number or the numbers in the input say."""

    def __init__(self, draws):
        super().__init__()
        self.linear, self.draws = nn.Linear(8, 8), draws

    def forward(self, h):
        count = random.randint(1, 5) if self.draws else int((h.sum() > 0).long() + 1)
        return self.linear(h)[:, :count]


class Counted(nn.Module):
    """A number beside the tensor."""

    def forward(self, h):
        return h, int((h > 0).sum())


class OfCounted(Model):
    def part_of(self, h):
        h, count = self.part(h)
        return h * count


class GetsNumber(Model):
    def part_of(self, h):
        return self.part(h, (h > 0).sum().item())


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h, count):
        return self.linear(h) / count if count > 1 and bool(h.isfinite().all()) else h


class GetsSize(Model):
    def part_of(self, h):
        return self.part(h, h.shape[0] + h.shape[1])


@pytest.mark.parametrize(
    ("kind", "part", "what"),
    [
        (Model, lambda: Cropped(True), r"'part' stays whole, and what it returns has sizes.*or on random numbers"),
        (Model, lambda: Cropped(False), r"'part' stays whole, and what it returns has sizes"),
        (OfCounted, Counted, r"'part' stays whole, and what it returns has.*values that are no tensors, which depend"),
        (GetsNumber, Scales, r"'part' stays whole, and it gets a number that code before it has read from a tensor"),
    ],
    ids=["drawn", "read", "returned", "given"],
)
def test_numbers_that_would_be_recorded_once_are_refused(kind, part, what):
    with pytest.raises(TraceError, match=what):
        sedona_fx.decouple(kind(part), (X, Y), blocks=1, leaf_modules=["part"])


def test_sizes_among_its_arguments_stay_free():
    model = GetsSize(Scales)
    net = sedona_fx.decouple(model, (X, Y), blocks=2, search="uniform")  # whole by itself
    assert net.plan.capture.front_end == "export"
    for x in (X, X[:2], torch.cat([X, X], 1)):
        assert torch.equal(net.eval()(x), model.eval()(x))
