"""The authors' decisions: small ones decoded by hand, and the released ones where they are at hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx import Plan, models, released_plan
from sedona_fx.errors import HeadError, PlanError

RELEASED = Path(__file__).parents[2] / "../shared/data/sedona_released.json"

# ResNet-18 has 8 base layers. By hand: p_isolate is largest behind the 6th, then the 2nd, then the 7th base layer.
ALPHA = [[-1.0, 1.0], [2.0, 0.5], [0.0, 0.0], [-3.0, 3.0], [0.1, 0.0], [9.0, -9.0], [0.7, -0.7]]
BETA = [
    [1.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.3, 0.1],
    [0.0, 0.0, 0.0, 9.0],
    [0.0, 5.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 1.0],
    [-4.0, -3.0, -5.0, -6.0],
    [0.2, 0.1, 0.1, 0.2],
]


def images():
    return torch.randn(2, 3, 32, 32), torch.tensor([0, 1])


def test_decoding_by_hand():
    model = models.resnet18(width=0.25)
    plan = released_plan(ALPHA, BETA, model)
    assert plan.cuts == ("layer1.1", "layer3.1", "layer4.0")
    assert plan.heads == ("sedona-3", "sedona-2", "sedona-1")
    assert plan.base_layers == tuple(f"layer{stage}.{k}" for stage in (1, 2, 3, 4) for k in (0, 1))[:-1]
    assert plan.model == "ResNet"
    assert plan.provenance["search"] == "released"
    assert torch.tensor(plan.provenance["alpha"]).allclose(torch.tensor(ALPHA))
    assert Plan.from_json(plan.to_json()) == plan
    two = released_plan(torch.tensor(ALPHA), [torch.tensor(row) for row in BETA], model, blocks=2)
    assert (two.cuts, two.heads) == (("layer3.1",), ("sedona-2",))
    assert released_plan(ALPHA, BETA, model, blocks=1).cuts == ()
    net = sedona_fx.decouple(model, images(), plan=plan, progress=False)
    assert net.plan.cuts == plan.cuts
    assert net.plan.heads == plan.heads


def test_heads_follow_the_nets_width():
    def heads(width, **options):
        return released_plan(ALPHA, BETA, models.resnet18(width=width), blocks=2, **options).heads

    # The first convolution has 64 * width channels.
    assert [heads(width) for width in (0.25, 0.45, 0.5, 1.0)] == [
        ("sedona-2",),
        ("sedona-2",),
        ("sedona-wide-2",),
        ("sedona-wide-2",),
    ]
    assert heads(1.0, heads="sedona-basic") == ("sedona-basic-2",)
    with pytest.raises(HeadError, match=r"no head named 'mlp-2': heads='mlp' is put before '-1', '-2'"):
        heads(1.0, heads="mlp")


def test_with_data_the_heads_are_tried_and_the_inputs_noted():
    plan = released_plan(ALPHA, BETA, models.resnet18(width=0.125), data=images())
    assert plan.inputs == {"x": {"shape": [2, 3, 32, 32], "dtype": "float32"}}

    class Dense(nn.Module):
        """A net of two base layers whose output is a map."""

        base_layers = ("first", "second")

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.second(self.first(x))

    one = ALPHA[:1], BETA[:1], Dense(), 2
    assert released_plan(*one).cuts == ("first",)
    with pytest.raises(HeadError, match=r"'sedona-1' cannot stand behind 'first'.*\(2, 4, 30, 30\).*\(2, 2, 28, 28\)"):
        released_plan(*one, data=images())


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (ALPHA[:-1], BETA[:-1], "the variables are for 7 base layers, and ResNet has 8"),
        (ALPHA, BETA[:-1], r"beta should be \(B-1, heads\) with the B-1 = 7 rows of alpha; it has 6"),
        ([row[:1] for row in ALPHA], BETA, r"alpha should be \(B-1, 2\), isolate and let through; it is \(7, 1\)"),
        ([[0.0, 1.0], [2.0]], BETA, "alpha should hold rows of numbers, all of one length"),
        ([["a", "b"]] * 7, BETA, "alpha should hold rows of numbers"),
        ([[float("nan"), 0.0]] * 7, BETA, "alpha holds values that are not finite"),
        (ALPHA, None, "beta should hold a row of numbers for each of the 7 rows of alpha, not NoneType"),
        (ALPHA, 3, "beta should hold a row of numbers for each of the 7 rows of alpha, not int"),
        (ALPHA, [[]] * 7, r"beta should be \(B-1, heads\)"),
    ],
)
def test_variables_that_are_none(alpha, beta, message):
    with pytest.raises(PlanError, match=message):
        released_plan(alpha, beta, models.resnet18(width=0.125))


def test_other_nets_and_numbers_of_blocks():
    with pytest.raises(PlanError, match="Sequential does not declare its base layers"):
        released_plan(ALPHA, BETA, nn.Sequential(nn.Linear(2, 2)))
    for blocks in (0, 9, True):
        with pytest.raises(PlanError, match=rf"blocks={blocks}: 8 base layers make 1 to 8 blocks"):
            released_plan(ALPHA, BETA, models.resnet18(width=0.125), blocks=blocks)


@pytest.mark.skipif(not RELEASED.exists(), reason="needs the authors' variables: ../shared/data/sedona_released.json")
@pytest.mark.parametrize("width", [0.25, 1.0])
@pytest.mark.parametrize(
    ("net", "cuts", "depths"),
    [
        ("vgg19", ("layers.5", "layers.12", "layers.13"), (4, 1, 1)),
        ("resnet50", ("layer3.2", "layer3.3", "layer3.4"), (4, 4, 4)),  # stages of 3, 4, 6, 3
    ],
)
def test_the_released_decisions(net, cuts, depths, width):
    found = json.loads(RELEASED.read_text())["plans"][net]
    plan = released_plan(found["alpha"], found["beta"], getattr(models, net)(width=width))
    assert plan.cuts == cuts
    assert plan.heads == tuple(f"sedona{'-wide' if width == 1.0 else ''}-{depth}" for depth in depths)
