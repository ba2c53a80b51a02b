"""Base layers by what a block holds: each has weights of its own, wherever its end stands in the program."""

import copy
import itertools

import pytest
import torch
from graphs import analysed, assert_blocks_right
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx import passes
from sedona_fx.errors import CutError, GraphSpecError
from sedona_fx.ir.graph import info
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.train import BackLink


class Same(nn.Module):
    """The identity, in the user's own code."""

    def forward(self, x):
        return x * 1.0


class Layer(nn.Module):
    """A residual layer; `order` says when the shortcut runs, or where it lies."""

    def __init__(self, i, o, same, order):
        super().__init__()
        self.a, self.b, self.order = nn.Linear(i, o), nn.Linear(o, o), order
        self.short = same() if i == o else nn.Linear(i, o)

    def forward(self, x):
        if self.order == "first":
            short = self.short(x)
            return self.b(F.relu(self.a(x))) + short
        if self.order == "between":
            h = F.relu(self.a(x))
            short = self.short(x)
            return self.b(h) + short
        return self.b(F.relu(self.a(x))) + self.short(x)


class Chain(nn.Module):
    def __init__(self, same, order="last", widths=(6, 8, 8, 8, 8)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Layer(i, o, same, order) for i, o in itertools.pairwise(widths)))
        self.last = nn.Linear(widths[-1], 3)

    def forward(self, x):
        return self.last(F.relu(self.layers(x)))


def batch():
    torch.manual_seed(1)
    return torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])


def layers_of(model):
    return passes.base_layers(analysed(model, batch()[0]).train)


@pytest.mark.parametrize("same", [nn.Identity, nn.Dropout, Same])
@pytest.mark.parametrize("order", ["first", "between", "last"])
def test_a_shortcut_with_a_module_ends_no_layer(same, order):
    # By hand: what is done to the shortcut has no weight. The first layer's shortcut reads the raw input, so a block
    # may end inside of that layer; behind the last layer the classifier alone is left.
    expected = ["layers.0:relu", "layers.0.b", "layers.0", "layers.1", "layers.2"]
    assert layers_of(Chain(same, order)) == layers_of(Chain(nn.Sequential, order)) == expected


@pytest.mark.parametrize("order", ["first", "between", "last"])
@pytest.mark.parametrize("search", ["uniform", "balanced", "latest"])
def test_no_rule_makes_a_block_without_weights(order, search):
    x, y = batch()
    for blocks in (2, 3, 4):
        net = sedona_fx.decouple(Chain(nn.Identity, order), (x, y), blocks=blocks, search=search, progress=False)
        same = sedona_fx.decouple(Chain(nn.Sequential, order), (x, y), blocks=blocks, search=search, progress=False)
        assert net.plan.cuts == same.plan.cuts
        sizes = [sum(p.numel() for p in block.base_parameters()) for block in net.blocks]
        assert sizes == [sum(p.numel() for p in block.base_parameters()) for block in same.blocks]
        assert all(sizes)
        assert_blocks_right(Chain(nn.Identity, order), x, y, list(net.plan.cuts))


def test_a_late_projection_is_counted_in_its_own_layer():
    """The weights of a side branch that runs early are those of the block that needs them."""

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            side = self.c(x)
            h = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.d(torch.tanh(h + side))

    # ":tanh" holds a alone, ":tanh#2" b, and the third tanh c: a head there would repeat the classifier.
    assert layers_of(Early()) == [":tanh", ":tanh#2"]


def test_a_value_read_before_it_is_overwritten():
    """The reader runs in the block of the write, so the block behind the write does not hold its weight."""

    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            side = self.b(h)
            h = h.mul_(2.0)
            out = torch.sin(h + side)
            return self.d(torch.tanh(self.c(out)))

    x, y = batch()
    for blocks in (2, 3, 4):
        for limit in (1, 2):
            graphs = analysed(Overwritten(), x)
            passes.cuts(graphs.train, max_live=limit)
            names = passes.base_layers(graphs.train)
            for chosen in itertools.combinations(names, min(blocks - 1, len(names))):
                net = sedona_fx.decouple(Overwritten(), (x, y), cuts=list(chosen), max_live=limit)
                assert all(list(block.base_parameters()) for block in net.blocks)


def test_a_link_reaches_one_layer():
    """BackLink with a reach of one base layer: the loss of block 1 changes the last layer of block 0 and no other."""
    x, y = batch()
    gradients = []
    for reach in (0, 1):
        net = sedona_fx.decouple(Chain(nn.Identity).double(), (x.double(), y), cuts=["layers.2"], heads="linear")
        schedule = BackLink(net, lambda params: torch.optim.SGD(params, lr=1.0), reach=reach)
        before = copy.deepcopy(net.model.state_dict())
        schedule.step(x.double(), y)
        gradients.append({n: before[n] - p.detach() for n, p in net.model.named_parameters()})
    moved = {n.rpartition(".")[0] for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])}
    assert moved == {"layers.2.a", "layers.2.b"}


def test_a_block_without_weights_is_the_users_own_or_a_bug():
    x, y = batch()
    net = sedona_fx.decouple(Chain(nn.Identity), (x, y), cuts=["layers.1", "layers.2.short"])  # the user's own
    assert not list(net.blocks[1].base_parameters())
    many = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(CutError, match=r"5 blocks need 4 cuts; .*, enough for 3 blocks with parameters in each"):
        sedona_fx.decouple(many, (x, y), blocks=5, search="uniform")
    gm = net.graph_module
    for node in gm.graph.nodes:
        if info(node).cut == "layers.2.short":
            info(node).base_layer = True
    with pytest.raises(GraphSpecError, match=r"block 1, between ends of base layers, has a weight"):
        verify(gm, Phase.LOWERED)


def test_declared_base_layers_without_a_weight_are_none():
    class Declares(nn.Sequential):
        base_layers = ("0", "1", "2", "4")

    model = Declares(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    assert layers_of(model) == ["0", "2"]
