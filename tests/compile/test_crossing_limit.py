"""Balance beats crossings: as many activations cross as even blocks need, and no more."""

import itertools

import pytest
import torch
from graphs import analysed, assert_blocks_right
from skips import Pyramid, Tokens, UNet, images, sentences
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.ir.flow import ancestors, dependency_graph
from sedona_fx.ir.graph import info
from sedona_fx.passes.cuts import possible
from sedona_fx.search import Balanced


def decouple(model, data, blocks=3, search="balanced", **how):
    return sedona_fx.decouple(model, data, blocks=blocks, search=search, progress=False, **how)


def bare_shares(net):
    """Return the share of each block in the FLOPs of the net, heads left out."""
    bare = decouple_bare(net)
    flops = [cost.flops for cost in bare.costs]
    return [count / sum(flops) for count in flops]


def decouple_bare(net):
    how = {"cuts": list(net.plan.cuts), "heads": False, "loss": None}
    data = (net.example, torch.zeros(1))
    return sedona_fx.decouple(net.model, data, **how)


def crossing(net):
    """Return how many activations cross at each cut."""
    places = possible(net.graph_module.graph)
    return [info(places[cut]).crossing for cut in net.plan.cuts]


NETS = {
    "unet": (UNet, images),
    "shallow unet": (lambda: UNet(depth=2, width=16), images),
    "deep unet": (lambda: UNet(depth=4, width=4), images),
    "pyramid": (Pyramid, images),
    "tokens": (Tokens, sentences),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_with_skips_are_cut_evenly(name):
    make, data = NETS[name]
    x, y = data()
    net = decouple(make(), (x, y))
    assert max(bare_shares(net)) <= 0.42, bare_shares(net)
    assert all(sum(p.numel() for p in block.base_parameters()) for block in net.blocks)
    assert max(crossing(net)) <= net.plan.max_live
    assert f"{max(c.flops for c in net.costs) / sum(c.flops for c in net.costs):.0%} of the FLOPs" in str(net)
    assert_blocks_right(make(), x, y, list(net.plan.cuts))


@pytest.mark.parametrize("search", ["uniform", "latest", "balanced"])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_every_rule_chooses_among_these_places(search, blocks):
    net = decouple(UNet(), images(), blocks, search)
    even = decouple(UNet(), images(), blocks)
    assert net.plan.max_live == even.plan.max_live
    assert net.plan.base_layers == even.plan.base_layers
    assert set(net.plan.cuts) <= set(net.plan.base_layers)
    assert net.plan.blocks == blocks


def brute_force(model, x, blocks, max_live):
    """Return the least largest share over all chains of places where so many activations cross at most."""
    graph = analysed(model, x).train.graph
    needs = dependency_graph(graph)
    total = sum(info(node).flops for node in graph.nodes)
    nodes = [node for node in possible(graph).values() if info(node).crossing <= max_live]
    held = {node: ancestors(node, needs) for node in nodes}
    flops = {node: sum(info(n).flops for n in held[node]) for node in nodes}
    least = 1.0
    for chosen in itertools.combinations(nodes, blocks - 1):
        if all(first in held[second] for first, second in itertools.pairwise(chosen)):
            edges = [0, *(flops[node] for node in chosen), total]
            least = min(least, max(b - a for a, b in itertools.pairwise(edges)) / total)
    return least


@pytest.mark.parametrize("name", ["unet", "pyramid"])
def test_as_few_cross_as_an_even_plan_needs(name):
    """One activation fewer makes the largest block larger, whatever the cuts; more make it hardly smaller."""
    make, data = NETS[name]
    x, y = data()
    net = decouple(make(), (x, y))
    share, unlimited = max(bare_shares(net)), brute_force(make(), x, 3, 99)
    assert share <= 1.1 * unlimited
    assert brute_force(make(), x, 3, net.plan.max_live - 1) > 1.1 * unlimited


def test_a_net_that_is_even_keeps_its_plan():
    """By hand: the layers cost alike, and inside of a residual layer two activations cross."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.relu(x + self.b(F.relu(self.a(x))))

    model = nn.Sequential(*(Layer() for _ in range(6)), nn.Linear(8, 3))
    data = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    for blocks, cuts in ((2, ("2",)), (3, ("1", "3"))):
        net = decouple(model, data, blocks, heads="linear")
        assert net.plan.max_live == 1
        assert net.plan.cuts == cuts
    # Five blocks of six layers: one has two of them, 1.6 times an even share; half layers make one of three halves.
    uneven = decouple(model, data, 5, max_live=1, heads="linear")
    assert max(bare_shares(uneven)) == pytest.approx(280 / 792)  # the last, which has no head
    even = decouple(model, data, 5, heads="linear")
    assert even.plan.max_live == 2
    assert max(bare_shares(even)) == pytest.approx(216 / 792)  # three halves and the classifier


def test_what_the_user_says_stands():
    for limit in (1, 2, 3, 4):
        net = decouple(UNet(), images(), 3, max_live=limit)
        assert net.plan.max_live == limit
        assert max(crossing(net)) <= limit
    for wrong in (0, -1, True, 2.0, "3"):
        with pytest.raises(CutError, match=r"max_live=.*: give a whole number of activations, at least 1"):
            decouple(UNet(), images(), 3, max_live=wrong)


@pytest.mark.parametrize("name", NETS)
def test_a_plan_keeps_its_number(name, tmp_path):
    """What ends base layers depends on it, so a net that is loaded has the same ones."""
    make, data = NETS[name]
    net = decouple(make(), data(), 3)
    again = sedona_fx.decouple(make(), data(), plan=net.plan)
    assert again.plan.max_live == net.plan.max_live > 1
    assert again.plan.base_layers == net.plan.base_layers
    assert sedona_fx.Plan.from_json(net.plan.to_json()) == net.plan
    net.save(tmp_path)
    loaded = sedona_fx.load(tmp_path, make())
    assert loaded.plan.base_layers == net.plan.base_layers
    assert loaded.variants.base_layers() == net.variants.base_layers()


def test_a_plan_goes_to_a_narrower_net_with_its_number():
    net = decouple(UNet(), images(), 3)
    other = sedona_fx.transfer_plan(net.plan, UNet(width=4))
    assert other.cuts == net.plan.cuts
    assert other.base_layers == net.plan.base_layers


def test_bytes_are_balanced_by_bytes():
    """A net whose FLOPs are late and whose bytes are early: the number of crossings follows what is balanced."""
    net = decouple(UNet(), images(), 3, Balanced(by="activation_bytes"))
    kept = [cost.activation_bytes for cost in decouple_bare(net).costs]
    assert max(kept) / sum(kept) <= 0.45
    within = decouple(UNet(), images(), 3, "uniform", budget={"activation_bytes": 1.3 * max(kept)})
    assert max(c.activation_bytes for c in within.costs) <= 1.3 * max(kept)


class Towers(nn.Module):
    """A long branch of small layers and a short one of large layers, side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(8, 8), nn.Tanh())))
        self.large = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.mix(self.small(x) + self.large(x))))


def test_of_two_branches_the_heavy_one_is_cut():
    # By hand, in weights: large 512 + 4096 + 512, small 512, the rest 64 + 24.
    net = decouple(Towers(), (torch.randn(4, 8), torch.tensor([0, 1, 2, 0])), 2, heads="linear")
    assert net.plan.cuts[0].startswith("large")
    assert max(bare_shares(net)) == pytest.approx(4608 / 5720, abs=1e-6)


def test_a_net_with_other_code_in_evaluation():
    """Functional dropout differs between the modes: both graphs get the same cuts at every number."""

    class Dropped(UNet):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, self.training)

    net = decouple(Dropped(), images(), 3)
    assert net.lowered(training=True) is not net.lowered(training=False)
    assert max(bare_shares(net)) <= 0.42


class Encoded(nn.Module):
    """An encoder of nine tokens where no built-in head fits the decoder's five, which reads it through a mixture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())))
        self.first, self.decoder = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 6)

    def forward(self, x, q):
        memory = self.encoder(x)
        h = self.first(q)
        for layer in self.decoder:
            scores = (h @ memory.transpose(1, 2)).softmax(-1)
            h = h + torch.tanh(layer(scores @ memory))
        return self.out(h)


def token_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def test_places_without_a_head_do_not_count():
    x, q = torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    for blocks in (2, 3, 4):
        net = decouple(Encoded(), ((x, q), torch.zeros(2, 5, dtype=torch.long)), blocks, loss=token_loss)
        assert net.plan.blocks == blocks
        assert all(net.plan.heads)
