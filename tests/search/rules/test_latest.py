"""Latest cuts: the last base layers there are."""

import itertools

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import BudgetError, CutError
from sedona_fx.search import Latest


def batch(size=4):
    return torch.randn(2, size), torch.tensor([0, 1])


def chain(*widths):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_vgg19_in_four():
    pair = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    net = sedona_fx.decouple(sedona_fx.models.vgg19(width=0.125), pair, blocks=4, search="latest", progress=False)
    assert net.plan.cuts == ("layers.12", "layers.13", "layers.14")
    assert net.plan.provenance["search"] == "latest"
    assert net.plan.provenance["head"] == "first"


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_every_number_of_blocks(blocks):
    model = chain(4, 4, 4, 4, 4, 4, 3)
    net = sedona_fx.decouple(model, batch(), blocks=blocks, search=Latest())
    assert len(net.plan.base_layers) == 4
    assert list(net.plan.cuts) == list(net.plan.base_layers)[5 - blocks :]


def test_too_many_blocks():
    with pytest.raises(CutError, match=r"6 blocks need 5 cuts; this model has 4 legal cut points"):
        sedona_fx.decouple(chain(4, 4, 4, 3), batch(), blocks=6, search="latest")


def test_within_a_budget_the_nearest_cut_is_taken():
    # By hand, a batch of 2: layers of 2 * 2 * 8 * 8 = 256 FLOPs; heads of 2 * 2 * 8 * 3 = 96. Behind base layers 0, 1,
    # 2, 3: the first block has 256 (k + 1) + 96, the rest 256 (4 - k) + 96.
    model = chain(8, 8, 8, 8, 8, 8, 3)

    def cut(limit):
        plan = sedona_fx.decouple(
            model, batch(8), blocks=2, search="latest", heads="linear", budget={"block_flops": limit}
        ).plan
        return list(plan.base_layers).index(plan.cuts[0])

    assert [cut(limit) for limit in (1120, 1119, 864)] == [3, 2, 2]
    with pytest.raises(BudgetError, match="no plan keeps within the budget"):
        cut(863)
