"""More blocks than base layers: these stay, and the places are added that split the largest blocks best."""

import itertools

import pytest
import torch
from graphs import analysed, cut_names, node_of
from torch import nn

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.ir.graph import info
from sedona_fx.passes import base_layers
from sedona_fx.passes.cuts import possible, resolve
from sedona_fx.passes.places import PlaceFinder, marked_places
from sedona_fx.train import BackLink


def images(size=32):
    return torch.randn(2, 3, size, size), torch.tensor([0, 1])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("search", ["uniform", "balanced", "latest"])
def test_resnet32_in_sixteen_is_the_stem_and_the_residual_blocks(search):
    """BackLink's own setting."""
    model = sedona_fx.models.resnet32(width=0.5)
    net = sedona_fx.decouple(model, images(), blocks=16, search=search, progress=False)
    paths = [f"layer{stage}.{k}" for stage in (1, 2, 3) for k in range(5)]
    every = resolve(net.graph_module.graph)
    assert [every[cut] for cut in net.plan.cuts] == [every[path] for path in ("stem", *paths[:-1])]
    assert net.plan.base_layers == tuple(str(info(every[path]).cut) for path in paths[:-1])
    # By hand: a stem with its norm, then blocks; the last holds the classifier as well.
    sizes = [sum(p.numel() for p in net.model.get_submodule(path).parameters()) for path in ("stem", *paths)]
    sizes[-1] += sum(p.numel() for p in net.model.fc.parameters())
    heads = [sum(p.numel() for p in head.parameters()) for head in net.heads.values()]
    assert [cost.parameters for cost in net.costs] == [a + b for a, b in zip(sizes, [*heads, 0], strict=True)]
    schedule = BackLink(net, sgd, reach=1)
    assert len(schedule.step(*images()).losses) == 16


@pytest.mark.parametrize("blocks", [15, 16, 17, 18, 20])
@pytest.mark.parametrize("make", [sedona_fx.models.resnet32, sedona_fx.models.resnet18])
def test_base_layers_stay_whatever_is_added(make, blocks):
    model = make(width=0.25)
    net = sedona_fx.decouple(model, images(), blocks=blocks, search="uniform", heads="linear", progress=False)
    assert len(net.plan.cuts) == blocks - 1
    assert set(net.plan.base_layers) <= set(net.plan.cuts)
    assert all(sum(p.numel() for p in block.base_parameters()) for block in net.blocks)
    places = possible(analysed(model, images()[0]).train.graph)
    for cut in net.plan.cuts:  # each ends a layer: what reads it alone is no norm and no activation
        first, *others = [str(user.target) for user in places[cut].users]
        assert others or not any(word in first for word in ("bn", "relu")), cut


def test_what_is_added_splits_the_largest_block():
    """By hand: base layers are declared as pairs, and each place in between splits its pair unevenly."""

    class Pairs(nn.Sequential):
        base_layers = ("3", "7", "11")

    widths = [4, 64, 8, 8, 8, 32, 4]  # weights: 256 + 512, 64 + 64, 256 + 128
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    model = Pairs(*layers, nn.Linear(4, 3))
    graph = analysed(model, torch.randn(2, 4)).train
    assert base_layers(graph) == ["3", "7"]
    names = cut_names(analysed(model, torch.randn(2, 4)))
    assert marked_places(graph, names, 2) == ["3", "7"]
    assert marked_places(graph, names, 3) == ["1", "3", "7"]
    assert marked_places(graph, names, 4) == ["1", "3", "7", "9"]
    assert marked_places(graph, names, 5) == ["1", "3", "5", "7", "9"]
    assert marked_places(graph, names, 6) == ["1", "3", "5", "7", "9", "11"]  # behind which the classifier is alone
    assert marked_places(graph, names, 7) == ["1", "3", "5", "7", "9", "11"]  # a tanh by itself has nothing to train
    finder = PlaceFinder(graph)
    ends = [node_of(graph, name) for name in names]
    found = [finder.find(ends, [node_of(graph, name) for name in ("3", "7")], wanted) for wanted in range(2, 8)]
    assert [places.rank for places in found] == [0, 1, 1, 1, 2, 4]
    before = [2 * 2 * weights for weights in (256, 768, 832, 896, 1152, 1280)]
    assert found[4].shares.before == tuple(before)
    assert found[4].shares.total == 4 * 1292


def test_a_norm_by_itself_comes_last():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    wanted = {2: ("2",), 3: ("0", "2")}
    for blocks, cuts in wanted.items():
        assert sedona_fx.decouple(model, data, blocks=blocks, search="uniform").plan.cuts == cuts
    with pytest.raises(CutError, match=r"4 blocks need 3 cuts; .* enough for 3 blocks with parameters in each"):
        sedona_fx.decouple(model, data, blocks=4, search="uniform")


@pytest.mark.parametrize("search", ["uniform", "balanced", "latest"])
def test_no_search_makes_a_block_without_parameters(search):
    layers = [m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.0))]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    data = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    for blocks in (2, 3, 4):
        net = sedona_fx.decouple(model, data, blocks=blocks, search=search)
        assert all(list(block.base_parameters()) for block in net.blocks)
        assert set(net.plan.cuts) <= {"2", "5", "8"}
    with pytest.raises(CutError, match=r"5 blocks need 4 cuts; this model has 9 legal cut points, enough for 4 blocks"):
        sedona_fx.decouple(model, data, blocks=5, search=search)
    own = sedona_fx.decouple(model, data, cuts=["0", "1"])  # the user may
    assert not list(own.blocks[1].base_parameters())
