"""Where a block may end."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from graphs import analysed, assert_blocks_right, cut_names, node_of
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, OutputError
from sedona_fx.ir.graph import info
from sedona_fx.ir.outputs import pick
from sedona_fx.passes import base_layers
from sedona_fx.passes.crossings import primary_node
from sedona_fx.passes.cuts import possible, resolve


def vision(name, size=64, **options):
    return analysed(getattr(torchvision.models, name)(num_classes=10, **options), torch.randn(2, 3, size, size))


def batch(rows=4, columns=4, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator), torch.arange(rows) % classes


@pytest.fixture(scope="module")
def resnet50():
    return vision("resnet50")


def test_resnet50_has_38_cuts_and_16_base_layers(resnet50):
    assert len(cut_names(resnet50)) == 38
    assert len(base_layers(resnet50.train)) == 16
    assert base_layers(resnet50.train)[:3] == ["maxpool", "layer1.0", "layer1.1"]


def test_no_cut_inside_a_residual_block(resnet50):
    names = cut_names(resnet50)
    assert "layer1.0" in names
    assert not [n for n in names if n.startswith("layer1.0.") and n != "layer1.0.relu#3"]
    every = resolve(resnet50.train.graph)
    assert every["layer1.2"] is every["layer1"]


def test_training_branches_of_googlenet_hide_nothing():
    graphs = vision("googlenet", init_weights=False)
    names = cut_names(graphs)
    assert len(names) == 25
    assert {"inception4a", "inception4b", "inception4d"} <= set(names)
    assert info(node_of(graphs.train, "aux1.fc2")).training_only
    assert not info(node_of(graphs.train, "fc")).training_only
    assert [str(info(n).cut) for n in graphs.eval.graph.nodes if info(n).cut] == names


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.position = nn.Parameter(torch.randn(4))


class Embedded(Chain):
    """Parameters that depend on no input, made ready at the start and used late."""

    def forward(self, x):
        late = torch.sin(self.position) * 2
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.d(torch.tanh(self.c(x + late)))


class RawSkip(Chain):
    """A branch on the raw input, computed first and used last."""

    def forward(self, x):
        skip = torch.tanh(self.a(x))
        x = torch.tanh(self.c(torch.tanh(self.b(x))))
        return self.d(x + skip)


class Skip(Chain):
    def forward(self, x):
        x = torch.tanh(self.a(x))
        y = torch.tanh(self.b(x))
        return self.d(torch.tanh(self.c(x + y)))


class Twice(Chain):
    """One layer called twice."""

    def forward(self, x):
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x))
        x = torch.tanh(self.b(x))
        return self.d(torch.tanh(self.c(x)))


class Tied(Chain):
    """Two layers, one parameter."""

    def __init__(self):
        super().__init__()
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


class TiedThroughValue(Chain):
    """A value made of a parameter, used at two places far from each other."""

    def forward(self, x):
        made = torch.exp(self.position)
        x = torch.tanh(self.b(torch.tanh(self.a(x)) * made))
        return self.d(torch.tanh(self.c(x)) * made)


class SharedBuffer(Chain):
    """A buffer that everybody reads and nobody writes crosses for free."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1]))

    def forward(self, x):
        x = torch.tanh(self.b(self.a(x) * self.mask))
        return self.d(self.c(x) * self.mask)


class WrittenBuffer(Chain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        x = torch.tanh(self.a(x) - self.mean)
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.d(torch.tanh(self.c(torch.tanh(self.b(x)))))


class Masked(Chain):
    """Integers, shapes and masks cross for free."""

    def forward(self, x):
        x = torch.tanh(self.a(x))
        keep, rows = x > 0, x.shape[0]
        x = torch.tanh(self.b(x))
        return self.d(torch.tanh(self.c(x)).reshape(rows, -1) * keep)


class Views(Chain):
    def forward(self, x):
        x = self.b(torch.tanh(self.a(x)))
        return self.d(torch.tanh(x)).view(-1, 3).flatten(1)


@pytest.mark.parametrize(
    ("kind", "legal", "illegal"),
    [
        (Embedded, ["a", "b", ":tanh", ":tanh#2", "c"], []),
        (RawSkip, ["b", "c"], ["a"]),
        (Skip, [":tanh", ":add", "c"], ["b", ":tanh#2"]),
        (SharedBuffer, ["a", "b", "c"], []),
        (WrittenBuffer, ["a", "b", "c"], []),
        (Masked, ["a", "b", "c"], []),
        (Views, ["a", "b"], ["d", ":view"]),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_legal_cuts_and_what_comes_of_them(kind, legal, illegal):
    torch.manual_seed(0)
    model, (x, y) = kind(), batch()
    names = resolve(analysed(model, x).train.graph)
    assert [cut for cut in legal if cut not in names] == []
    assert [cut for cut in illegal if cut in names] == []
    modules = dict(model.named_modules())
    net = assert_blocks_right(model, x, y, [cut for cut in legal if cut in modules])
    if kind is Embedded:
        (home,) = [b.index for b in net.blocks if "position" in dict(b.module.named_parameters())]
        assert home == len(net.blocks) - 2  # the one of the addition
    for cut in illegal:
        if cut in possible(analysed(model, x.double()).train.graph):  # not offered, but right if the user insists
            assert_blocks_right(model, x, y, [cut])
            continue
        with pytest.raises(CutError, match="no legal cut"):
            sedona_fx.decouple(model, (x.double(), y), cuts=[cut])


@pytest.mark.parametrize(
    ("kind", "legal"),
    [
        (Twice, ["a", ":tanh", "b", ":tanh#2", "b#2", "c"]),
        (Tied, ["a", ":tanh", "b", ":tanh#2", "c"]),
        (TiedThroughValue, ["a", "b", "c"]),
    ],
)
def test_users_of_one_parameter_may_be_cut_apart(kind, legal):
    assert set(legal) <= set(cut_names(analysed(kind(), batch()[0])))


def test_two_towers_are_cut_along_the_longer_one():
    class Towers(Chain):
        def forward(self, x, z):
            left = torch.tanh(self.a(x))
            right = torch.tanh(self.c(torch.tanh(self.b(z))))
            return self.d(left + right)

    x, y = batch()
    names = cut_names(analysed(Towers(), x, x))
    assert names == ["b", ":tanh#2", "c", ":tanh#3", ":add"]
    model = Towers().double()
    net = sedona_fx.decouple(model, ((x.double(), x.double()), y), cuts=["b", "c"])
    net.backward((x.double(), x.double()), y)
    assert all(p.grad is not None for n, p in net.model.named_parameters() if n != "position")


def test_dead_code_changes_nothing():
    class Dead(Chain):
        def forward(self, x):
            x = torch.tanh(self.a(x))
            (x * 3).exp()
            self.b(x)
            return self.d(torch.tanh(self.c(x)))

    x, y = batch()
    names = resolve(analysed(Dead(), x).train.graph)
    assert {"a", "c"} <= names.keys()
    assert "b" not in names
    net = sedona_fx.decouple(Dead(), (x, y), cuts=["a", "c"])
    net.backward(x, y)
    assert net.model.b.weight.grad is None


@dataclass
class Out:
    extra: Tensor
    logits: Tensor | None = None


Pair = namedtuple("Pair", ["hidden", "scores"])


@pytest.mark.parametrize(
    ("wrap", "output", "key"),
    [
        (lambda h, o: {"hidden": h, "logits": o}, None, "logits"),
        (lambda h, o: {"scores": o, "hidden": h}, None, "scores"),
        (lambda h, o: {"hidden": h, "scores": o}, "scores", "scores"),
        (lambda h, o: (o, h), None, 0),
        (lambda h, o: (h, o), 1, 1),
        (lambda h, o: [o, h.argmax(1)], None, 0),
        (lambda h, o: (h.argmax(1), o), None, 1),
        (lambda h, o: Out(extra=h, logits=o), None, "logits"),
        (lambda h, o: Out(o), "extra", "extra"),
        (lambda h, o: Pair(hidden=h, scores=o), "scores", "scores"),
    ],
)
def test_outputs_of_every_kind(wrap, output, key):
    class Wrapped(Chain):
        def forward(self, x):
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            return wrap(h, self.d(torch.tanh(self.c(h))))

    torch.manual_seed(0)
    model, (x, y) = Wrapped(), batch()
    graphs = analysed(model, x, output=output)
    assert graphs.output.key == key
    assert str(primary_node(graphs.train.graph, output)) == "d"
    assert {"a", "b"} <= resolve(graphs.train.graph).keys()

    def loss(value, target):
        return F.cross_entropy(pick(value, key) if not isinstance(value, Tensor) else value, target)

    net = sedona_fx.decouple(model, (x, y), cuts=["a", "b"], output=output, loss=loss)
    got, expected = net(x), model(x)
    assert type(got) is type(expected)
    net.backward(x, y)
    assert all(p.grad is not None for n, p in net.model.named_parameters() if n != "position")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("wrong", r"output='wrong' names no float tensor in what the model returns \(\w*dict\); .*\['a', 'b'\]"),
        ("n", r"output='n' names no float tensor"),
    ],
)
def test_an_output_that_is_not_there(output, message):
    class Two(Chain):
        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x), "n": x.argmax(1)}

    with pytest.raises(OutputError, match=message):
        analysed(Two(), torch.randn(2, 4), output=output)


def test_declared_base_layers_are_taken():
    graphs = analysed(sedona_fx.models.vgg19(num_classes=10, width=0.125), torch.randn(2, 3, 32, 32))
    assert len(base_layers(graphs.train)) == 15  # the 16th ends where the model does


def test_base_layers_by_rule():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    )
    graphs = analysed(model, torch.randn(2, 3, 8, 8))
    assert cut_names(graphs) == [str(k) for k in range(10)]
    assert base_layers(graphs.train) == ["3", "6"]


def test_a_module_that_returns_several_values_is_no_cut_but_what_is_in_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.inner(x).tanh()
            return self.last(h), x.mean()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.out = Two(), nn.Linear(4, 3)

        def forward(self, x):
            h, scale = self.two(x)
            return self.out(h.tanh()) * scale

    data = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(CutError, match=r"module 'two', which returns several values.*the last is 'two\.last'"):
        sedona_fx.decouple(Model(), data, cuts=["two"])
    assert sedona_fx.decouple(Model(), data, cuts=["two.last"]).plan.cuts == ("two.last",)
