"""In-place operations near cuts: nothing that a head or a backward reads is overwritten, and no order is lost."""

import pytest
import torch
from graphs import analysed, assert_blocks_right, cut_names, node_of
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.ir.graph import info
from sedona_fx.passes.cuts import possible
from sedona_fx.passes.explicit_writes import opaque_writes


class Base(nn.Module):
    """Layers `a`, `b`, `c` of four features and a classifier `d`; subclasses say what happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)


class LaterReader(Base):
    """x is overwritten, and read again under its old name."""

    def forward(self, x):
        x = self.a(x)
        F.relu_(x)
        return self.d(self.c(self.b(x)) + x.mean())


class BehindCut(Base):
    def forward(self, x):
        return self.d(self.act(self.c(self.act(self.b(self.act(self.a(x)))))))


class AddBehindCut(Base):
    def forward(self, x):
        x = self.a(x)
        x += 1.5
        y = self.b(x)
        y *= 2
        return self.d(self.act(self.c(y)))


class SkipInPlace(Base):
    """The residual block of torchvision: the branch is added in place, and the sum activated in place."""

    def forward(self, x):
        h = self.a(x)
        out = self.b(self.act(h))
        out += h
        return self.d(self.act(self.c(self.act(out))))


class SetItem(Base):
    def forward(self, x):
        x = self.a(x)
        x[:, 0] = 5.0
        mask = x > 0
        x = self.b(x)
        x[:, 1] = x[:, 2]
        return self.d(self.c(x) * mask)


class ThroughView(Base):
    def forward(self, x):
        x = self.a(x)
        y = self.b(torch.sin(x))
        y[:, 0].mul_(0.5)
        keep = y > 0.1
        z = self.c(torch.cos(y))
        return self.d(z * keep)


class ViewReadLater(Base):
    """A view made before the write sees what was written after it."""

    def forward(self, x):
        x = self.a(x)
        view = x.view(-1, 2, 2)
        x.mul_(3.0)
        return self.d(self.c(self.b(view.flatten(1))))


class MaskBeforeWrite(Base):
    """A mask is taken before an in-place operation and used blocks later: it must not sink behind the write."""

    def forward(self, x):
        x = self.a(x)
        mask = x > 0
        x = self.act(x)
        x = self.b(x)
        return self.d(self.c(x) * mask)


class ParameterWritten(Base):
    """A parameter reaches the output only through a write."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1))

    def forward(self, x):
        x = self.b(self.a(x))
        x[:, 0] = self.token
        return self.d(self.c(x))


class BranchWrittenThroughView(Base):
    """A whole branch reaches the output only through a write that no edge shows."""

    def forward(self, x):
        x = self.a(x)
        branch = x * 2
        h = self.b(x)
        z = self.c(torch.tanh(h))
        z[:, 1:3].copy_(branch[:, 1:3])
        return self.d(torch.tanh(z))


class WrittenInput(Base):
    def forward(self, x):
        before = x > 0.5
        x.mul_(2)
        h = self.a(x)
        return self.d(self.c(self.b(h)) * (x > 0.5) * before)


class Returned(nn.Module):
    """A module returns its input, activated in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        F.relu_(x)
        return x


class InPlaceOnInput(Base):
    def __init__(self):
        super().__init__()
        self.inner = Returned()

    def forward(self, x):
        x = self.inner(self.a(x))
        return self.d(self.c(self.inner(self.b(x))))


class OutArgument(Base):
    def forward(self, x):
        x = self.a(x).detach() + self.b(x)
        with torch.no_grad():
            room = torch.empty_like(x.detach())
            torch.gt(x.detach(), 0, out=room)
        return self.d(self.c(x) * room)


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        (LaterReader, []),
        (BehindCut, ["a", "b", "c"]),
        (AddBehindCut, ["a", "b", "c"]),
        (SkipInPlace, ["c"]),
        (SetItem, ["b"]),
        (SetItem, ["a", "b", "c"]),
        (ThroughView, ["a"]),
        (ThroughView, ["a", "c"]),
        (ViewReadLater, ["b", "c"]),
        (MaskBeforeWrite, ["b"]),
        (MaskBeforeWrite, ["b", "c"]),
        (ParameterWritten, ["a", "b", "c"]),
        (BranchWrittenThroughView, ["a"]),
        (BranchWrittenThroughView, []),
        (WrittenInput, ["a", "b"]),
        (InPlaceOnInput, ["a", "b", "c"]),
        (OutArgument, []),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v) or "one",
)
def test_outputs_and_gradients_near_cuts(kind, cuts):
    torch.manual_seed(0)
    model = kind()
    names = cut_names(analysed(model, *batch()[:1]))
    assert [name for name in names if name in cuts] == cuts, names
    assert_blocks_right(model, *batch(), cuts)


@pytest.mark.parametrize(
    "kind",
    [
        *(LaterReader, BehindCut, AddBehindCut, SkipInPlace, SetItem, ThroughView, ViewReadLater, MaskBeforeWrite),
        *(ParameterWritten, BranchWrittenThroughView, WrittenInput, InPlaceOnInput),
    ],
)
def test_every_legal_cut_alone_and_all_together(kind):
    torch.manual_seed(0)
    model = kind()
    x, y = batch()
    names = cut_names(analysed(model, x))
    plain = kind()
    plain.load_state_dict(model.state_dict())
    expected = F.cross_entropy(plain.double()(x.double()), y)
    expected.backward()
    for cuts in [*([name] for name in names), names]:
        net = sedona_fx.decouple(model.double(), (x.double(), y), cuts=cuts)
        losses = net.losses(x.double(), y)
        assert torch.equal(losses[-1], expected), cuts
        net.backward(x.double(), y)
        for name, parameter in plain.named_parameters():
            assert (parameter.grad is None) or (net.model.get_parameter(name).grad is not None), (cuts, name)


def test_later_readers_take_the_overwriting_node():
    graphs = analysed(LaterReader(), batch()[0])
    written = node_of(graphs.train, ":relu_")
    assert node_of(graphs.train, ":mean").args[0] is written
    assert not opaque_writes(graphs.train.graph)
    assert info(written).mutates == info(written).storages == info(node_of(graphs.train, "a")).storages


def test_no_cut_on_or_inside_the_life_of_an_opaquely_written_storage():
    graphs = analysed(ThroughView(), batch()[0])
    (write,) = opaque_writes(graphs.train.graph)
    names = cut_names(graphs)
    assert "a" in names
    assert ":sin" in names
    assert "b" not in names
    assert ":getitem" not in names
    nodes = list(graphs.train.graph.nodes)
    assert all(info(node).cut is None for node in nodes[write.first : write.last])


def test_a_branch_written_through_a_view_counts_as_live():
    names = cut_names(analysed(BranchWrittenThroughView(), batch()[0]))
    assert names[0] == "a"
    assert not {"b", "c", ":tanh"} & set(names)


class Marks(nn.Module):
    """Overwrites what it is given and returns it."""

    def forward(self, x):
        x[:, 0] = 0.5
        return x


class MarkedTwice(Base):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = Marks(), Marks()

    def forward(self, x):
        h = self.a(x)
        self.w1(h)
        h = self.w2(h)
        return self.d(self.c(self.b(h.sin()).tanh()))


def test_a_module_that_overwrites_what_was_overwritten_ends_at_its_own_write():
    graph = analysed(MarkedTwice(), batch()[0]).train.graph
    names = {name: info(node).site for name, node in possible(graph).items()}
    assert names["a"] == "a"
    assert names["w1"] == "w1:setitem"
    assert names["w2"] == "w2:setitem"


class LateView(Base):
    """Only the second output reads a view, made before a write that it shows."""

    def forward(self, x):
        h = self.a(x)
        view = h.view(-1, 4)
        h[:, 0] = 0.5
        return {"logits": self.d(self.c(self.b(h.sin()).tanh())), "extra": view}


def test_a_view_that_only_another_output_reads_shows_the_write():
    x, y = batch()
    model = LateView()
    net = sedona_fx.decouple(model, (x, y), cuts=["b"], loss=lambda o, y: F.cross_entropy(o["logits"], y))
    assert torch.equal(net.backward(x, y).output["extra"], model(x)["extra"])


class DeadEnd(Base):
    """Dead code of a value behind the first cut, and of a value of the last block."""

    def forward(self, x):
        h = self.a(x)
        n = self.b(h)
        e = (h * 2).sin()
        _ = e + n
        return self.d(self.c(e).tanh()), e


def test_dead_code_behind_a_cut():
    x, y = batch()
    net = sedona_fx.decouple(DeadEnd(), (x, y), cuts=["a", ":mul"], loss=lambda o, y: F.cross_entropy(o[0], y))
    net.backward(x, y)
