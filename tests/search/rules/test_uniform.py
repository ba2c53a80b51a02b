"""Uniform cuts: SEDONA's baseline."""

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.search.rules.uniform import uniform_layers


def test_vgg19_in_four():
    assert uniform_layers(16, 4) == [3, 7, 11]
    model = sedona_fx.models.vgg19(num_classes=10, width=0.125)
    net = sedona_fx.decouple(
        model, (torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), blocks=4, search="uniform", progress=False
    )
    places = list(net.plan.base_layers)
    assert len(places) == 15
    assert [places.index(cut) for cut in net.plan.cuts] == [3, 7, 11]
    assert net.plan.provenance["search"] == "uniform"


@pytest.mark.parametrize("count", range(1, 20))
def test_every_number_of_blocks(count):
    for blocks in range(1, count + 1):
        layers = uniform_layers(count, blocks)
        assert len(layers) == blocks - 1
        assert layers == sorted(set(layers))
        assert all(0 <= layer < count - 1 for layer in layers)


def batch():
    return torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


def test_more_blocks_than_base_layers_keep_these():
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    few = sedona_fx.decouple(nn.Sequential(*layers), batch(), blocks=2, search="uniform")
    assert few.plan.base_layers == ("1",)
    assert few.plan.cuts == ("1",)
    for search in ("uniform", "balanced"):
        many = sedona_fx.decouple(nn.Sequential(*layers), batch(), blocks=3, search=search)
        assert many.plan.cuts == ("1", "3")
        for blocks in (4, 6):  # a ReLU by itself has nothing to train
            told = (
                rf"{blocks} blocks need {blocks - 1} cuts; this model has 4 legal cut points, enough for 3 blocks with"
            )
            with pytest.raises(CutError, match=told):
                sedona_fx.decouple(nn.Sequential(*layers), batch(), blocks=blocks, search=search)
