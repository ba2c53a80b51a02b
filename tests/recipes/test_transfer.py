"""Plans for other nets: wider and deeper ones, by paths and by fractions worked out by hand."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx import Plan, models, transfer_plan
from sedona_fx.errors import DataError, HeadError, PlanError
from sedona_fx.recipes.transfer import nearest_layers


def images(size=32):
    return torch.randn(2, 3, size, size), torch.tensor([0, 1])


def planned(model, data, **options):
    return sedona_fx.decouple(model, data, progress=False, **options).plan


@pytest.fixture(scope="module")
def narrow():
    """A plan for the quarter-width VGG-19, cut where SEDONA's authors cut it."""
    cuts, heads = ["layers.5", "layers.12", "layers.13"], ["sedona-4", "sedona-1", "sedona-1"]
    return planned(models.vgg19(width=0.25), images(), cuts=cuts, heads=heads)


@pytest.fixture(scope="module")
def short():
    """A plan for ResNet-32: 15 base layers, five a stage."""
    return planned(models.resnet32(), images(16), cuts=["layer1.2", "layer2.1", "layer3.0"])


def test_a_wider_net_by_path(narrow, caplog):
    wide = models.vgg19(width=1.0)
    state = copy.deepcopy(wide.state_dict())
    with caplog.at_level(logging.INFO, logger="sedona_fx"):
        plan = transfer_plan(narrow, wide)
    assert plan.cuts == ("layers.5", "layers.12", "layers.13")
    assert plan.heads == ("sedona-4", "sedona-1", "sedona-1")
    assert plan.base_layers == tuple(f"layers.{k}" for k in range(15))
    assert plan.provenance["transfer"] == {
        "from": {"model": "VGG", "base_layers": 16},
        "by": "path",
        "map": [[cut, cut] for cut in plan.cuts],
    }
    assert plan.provenance["search"] == "user"
    assert "the plan of VGG for VGG, by path: layers.5 -> layers.5, layers.12 -> layers.12" in caplog.text
    assert all(torch.equal(state[name], tensor) for name, tensor in wide.state_dict().items())
    assert Plan.from_json(plan.to_json()) == plan
    net = sedona_fx.decouple(wide, images(), plan=plan, progress=False)
    assert net.plan.cuts == plan.cuts
    assert [sum(p.numel() for p in net.blocks[0].head.parameters() if p.dim() == 4)] == [
        # 256 channels at 8x8, by hand: 1x1 to 64, 3x3 depthwise, three inverted residuals, 1x1 to 512.
        256 * 64 + 64 * 9 + inverted(64, 64) + inverted(64, 96) + inverted(96, 96) + 96 * 512
    ]
    assert net.plan.provenance["transfer"] == plan.provenance["transfer"]


def inverted(channels, out):
    return channels * 4 * channels + 4 * channels * 9 + 4 * channels * out


def test_a_deeper_net_by_fraction(short):
    deep = models.resnet110()
    plan = transfer_plan(short, deep)
    # 54 base layers, 18 a stage. Behind the 3rd, 7th, 11th of 15: 10.8, 25.2, 39.6 of 54, so the 11th, 25th, 40th.
    assert plan.cuts == ("layer1.10", "layer2.6", "layer3.3")
    assert plan.provenance["transfer"]["by"] == "fraction"
    assert plan.provenance["transfer"]["from"] == {"model": "ResNet", "base_layers": 15}
    assert plan.provenance["transfer"]["map"] == [
        ["layer1.2", "layer1.10"],
        ["layer2.1", "layer2.6"],
        ["layer3.0", "layer3.3"],
    ]
    assert plan.inputs == {"x": {"shape": [2, 3, 16, 16], "dtype": "float32"}}
    net = sedona_fx.decouple(deep, images(16), plan=plan, progress=False)
    assert net.plan.cuts == ("layer1.10", "layer2.6", "layer3.3")
    # Behind each cut the path is there as well, but the nets are not equally deep: by path only if it is asked for.
    assert transfer_plan(short, deep, by="path").cuts == short.cuts
    back = transfer_plan(plan, models.resnet32())
    assert back.cuts == short.cuts


def test_example_data_is_taken_as_decouple_takes_it(short):
    pair = images(24)
    for data in (pair, [pair, pair]):
        plan = transfer_plan(short, models.resnet32(width=0.5), data=data)
        assert plan.inputs["x"]["shape"] == [2, 3, 24, 24]
        assert plan.cuts == short.cuts
    with pytest.raises(DataError, match=r"the plan does not say what .* look like: hand one batch in data="):
        transfer_plan(Plan(cuts=("layer1.0",), heads=(None,)), models.resnet32())


def cuts_by_all_choices(cuts, count, target):
    """Try every strictly increasing choice; the first of the best ones."""
    distances = {
        choice: sum(abs((j + 1) * count - (i + 1) * target) for i, j in zip(cuts, choice, strict=True))
        for choice in itertools.combinations(range(target - 1), len(cuts))
    }
    return list(min(distances, key=lambda choice: (distances[choice], choice)))


@pytest.mark.parametrize(("count", "target"), [(6, 6), (6, 11), (11, 6), (7, 5), (4, 9), (9, 4)])
def test_fractions_against_all_choices(count, target):
    for blocks in range(min(count, target)):
        for cuts in itertools.combinations(range(count - 1), blocks):
            assert nearest_layers(cuts, count, target) == cuts_by_all_choices(cuts, count, target), cuts


def test_fractions_by_hand():
    assert nearest_layers([3, 7, 11], 16, 16) == [3, 7, 11]
    assert nearest_layers([2, 6, 10], 15, 54) == [10, 24, 39]
    assert nearest_layers([0], 2, 5) == [1]  # a half of 5 lies between the 2nd and the 3rd
    assert nearest_layers([5, 6, 7], 16, 8) == [1, 2, 3]  # 3, 3.5 and 4 of 8, each once: 2nd, 3rd, 4th
    assert nearest_layers([14], 16, 4) == [2]  # behind the last base layer there is no cut
    assert nearest_layers([], 3, 7) == []


class Two(nn.Module):
    """A chain with other names than those of `nn.Sequential`."""

    def __init__(self, layers=4, width=8):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return self.last(x)


def vectors(width=8):
    return torch.randn(2, width), torch.tensor([0, 1])


def test_nets_that_do_not_correspond(short, narrow):
    message = r"made for VGG, does not correspond to ResNet: it names 'layers.5', 'layers.12', 'layers.13', where"
    with pytest.raises(PlanError, match=message):
        transfer_plan(narrow, models.resnet32(), by="path")
    small = planned(Two(6), vectors(), cuts=["parts.0", "parts.1", "parts.2"], heads="linear")
    with pytest.raises(PlanError, match=r"it has 3 cuts, and Two has 3 base layers, which have room for 2\."):
        transfer_plan(small, Two(3))
    with pytest.raises(PlanError, match=r"by='place': a plan is transferred by 'path' or by 'fraction'"):
        transfer_plan(small, Two(3), by="place")
    inside = planned(Two(6), vectors(), cuts=["parts.0.0"], heads="linear")
    with pytest.raises(PlanError, match=r"'parts.0.0' end none of the \d base layers of Two\. by='path'"):
        transfer_plan(inside, Two(8), by="fraction")
    assert transfer_plan(inside, Two(8), by="path").cuts == ("parts.0.0",)
    rooted = Plan(cuts=("body.0",), heads=(None,), root="body", inputs=small.inputs)
    with pytest.raises(PlanError, match="the plan cuts inside of 'body', which Two does not have"):
        transfer_plan(rooted, Two())
    with pytest.raises(DataError, match="do not fit the model's forward"):
        transfer_plan(Plan(cuts=("parts.0",), heads=(None,), inputs={"image": small.inputs["x"]}), Two())


def test_heads_are_tried_at_their_new_places(short):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)))
            self.last = nn.Linear(16, 3)

        def forward(self, x):
            return self.last(self.layers(x).mean(1))

    pair = torch.randn(2, 5, 16), torch.tensor([0, 1])
    message = r"cut 'layer1.2' does not fit: head 'mlp-sr' cannot stand .*activation there is \(2, 5, 16\).*\(2, 3\)"
    few = Plan(cuts=short.cuts[:1], heads=short.heads[:1], base_layers=short.base_layers)
    with pytest.raises(HeadError, match=message):
        transfer_plan(few, Tokens(), data=pair)
    # What is not registered is for decouple(plan=..., heads=[...]) to find.
    named = Plan(cuts=short.cuts[:1], heads=("some:factory",), base_layers=short.base_layers)
    assert transfer_plan(named, Tokens(), data=pair).heads == ("some:factory",)
    without = Plan(cuts=short.cuts[:1], heads=(None,), base_layers=short.base_layers)
    assert transfer_plan(without, Tokens(), data=pair).heads == (None,)
