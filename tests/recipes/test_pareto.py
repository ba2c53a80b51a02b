"""The front of loss against cost: its plans are what they are said to be, and none of those tried beats them."""

import copy
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from captured import Capture, captured
from torch import nn
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.errors import BudgetError, CutError, DataError, SearchDivergedError
from sedona_fx.heads.registry import build_head
from sedona_fx.recipes.pareto import FrontPoint, non_dominated
from sedona_fx.search import Rollout
from sedona_fx.train import Greedy

HEADS = ["linear", "sedona-1"]
QUICK = {"blocks": 3, "heads": HEADS, "points": 4, "plans_a_point": 3, "progress": False, "seed": 7}


def net_of():
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in itertools.pairwise([3, 8, 8, 12, 12, 16])
    ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def batches(count, seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(count)]


TRAIN, VAL = batches(5, 0), batches(2, 1)


@pytest.fixture(scope="module")
def front():
    return sedona_fx.pareto(net_of(), TRAIN, val_data=VAL, search=Rollout(steps=5), **QUICK)


def cost_of(plan):
    return max(cost.activation_bytes for cost in sedona_fx.decouple(net_of(), TRAIN, plan=plan).costs)


def test_the_points_are_those_that_nothing_beats(front):
    assert (front.cost, front.steps) == ("activation_bytes", 5)
    assert len({(p.plan.cuts, p.plan.heads) for p in front.tried}) == len(front.tried) >= 8
    beaten = [
        any(q.cost <= p.cost and q.loss <= p.loss and (q.cost, q.loss) != (p.cost, p.loss) for q in front.tried)
        for p in front.tried
    ]
    kept = sorted({(p.cost, p.loss) for p, no in zip(front.tried, beaten, strict=True) if not no})
    assert [(p.cost, p.loss) for p in front.points] == kept
    assert len({p.cost for p in front.tried}) >= 4


def test_costs_and_losses_are_those_of_the_plan_trained_alone(front):
    contexts = captured(net_of(), TRAIN, blocks=3, heads=HEADS).contexts
    for point in front.tried[::4]:
        assert point.cost == cost_of(point.plan)
        net = sedona_fx.decouple(net_of(), TRAIN, plan=point.plan, seed=7)
        for block, cut, head in zip(net.blocks, point.plan.cuts, point.plan.heads, strict=False):
            torch.manual_seed(7)
            block.head.load_state_dict(build_head(head, contexts[cut]).state_dict())
        greedy = Greedy(net, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4))
        for x, y in TRAIN:
            greedy.step(x, y)
        net.eval()
        with torch.no_grad():
            loss = sum(cross_entropy(net(x), y).item() for x, y in VAL) / len(VAL)
        assert point.loss == pytest.approx(loss, rel=1e-5)


def test_the_cheapest_plan_of_all_is_among_those_tried(front):
    places = front.points[0].plan.base_layers
    least = min(
        cost_of(sedona_fx.Plan(cuts=cuts, heads=heads))
        for cuts in itertools.combinations(places, 2)
        for heads in itertools.product(HEADS, repeat=2)
    )
    assert front.points[0].cost == front.tried[0].cost == least


def test_it_is_the_same_again_and_leaves_everything_alone(front):
    model = net_of()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    again = sedona_fx.pareto(model, TRAIN, val_data=VAL, search=Rollout(steps=5), **QUICK)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert again == front


class Noisy(torch.utils.data.Dataset):
    """Examples with noise from all three global streams, as augmentation has it."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(18, 3, 8, 8, generator=g), torch.randint(4, (18,), generator=g)

    def __len__(self):
        return 18

    def __getitem__(self, k):
        return self.x[k] + random.random() + np.random.rand() + torch.rand(8), self.y[k]


def test_data_that_draws_gives_the_same_front_again_and_all_streams_back(monkeypatch):
    model, own, accelerators = net_of(), torch.Generator(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", accelerators.append)
    train = torch.utils.data.DataLoader(Noisy(0), batch_size=6, shuffle=True, generator=own)
    val = torch.utils.data.DataLoader(Noisy(1), batch_size=9, shuffle=True)
    how = {"val_data": val, "search": Rollout(steps=4), **QUICK, "points": 2, "plans_a_point": 2}

    def states():
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), own.get_state().tolist(), random.getstate(), name, keys.tolist(), *rest]

    def seed_all():
        torch.default_generator.manual_seed(1), random.seed(2), np.random.seed(3), own.manual_seed(4)

    seed_all()
    sedona_fx.decouple(model, train, val_data=val, blocks=3, search=Capture(), heads=HEADS)
    looked_at = states()  # a search's data is looked at once, to see its shapes
    seed_all()
    first = sedona_fx.pareto(model, train, **how)
    assert states() == looked_at
    torch.rand(3), random.random(), np.random.rand(), torch.rand(3, generator=own)
    assert sedona_fx.pareto(model, train, **how) == first
    assert not accelerators
    assert sedona_fx.pareto(model, train, **{**how, "seed": 8}) != first


def diverging(context):
    """A head whose loss is not a number."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(context.channels, 4), Nan())


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_plans_that_fail_stay_out_of_the_front_and_are_strict_json(tmp_path):
    how = {**QUICK, "heads": ["linear", diverging]}
    front = sedona_fx.pareto(net_of(), TRAIN, val_data=VAL, search=Rollout(steps=1), **how)
    failed = [point for point in front.tried if any("diverging" in head for head in point.plan.heads)]
    assert failed
    for point in front.tried:
        assert math.isinf(point.loss) == (point in failed)
        read = sedona_fx.Plan.from_json(strict(point.plan))
        assert read == point.plan
        assert read.provenance["val_loss"] == (None if point in failed else point.loss)
    assert not {id(point) for point in failed} & {id(point) for point in front.points}
    assert front.plot(tmp_path / "front.png").exists()
    assert "inf" not in str(front)


def strict(plan):
    """Return a plan's JSON, if a reader that knows the standard alone takes it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    return plan.to_json()


@pytest.mark.parametrize("cost", ["block_flops", "head_flops", "block_seconds"])
def test_other_costs_and_a_budget(cost, tmp_path):
    budget = {"activation_bytes": 110_000}
    front = sedona_fx.pareto(net_of(), TRAIN, cost=cost, search=Rollout(steps=1), budget=budget, **QUICK)
    for point in front.tried:
        assert cost_of(point.plan) <= 110_000
        if cost == "block_flops":
            assert point.cost == max(c.flops for c in sedona_fx.decouple(net_of(), TRAIN, plan=point.plan).costs)
    cheapest = front.points[0]
    assert cheapest.plan.provenance["cost"] == cheapest.cost > 0
    sedona_fx.decouple(net_of(), TRAIN, plan=cheapest.plan, budget={cost: cheapest.cost})
    path = front.plot(tmp_path / "front.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(front).count("\n") == len(front.points) + 2


def test_the_table(front):
    lines = str(front).splitlines()
    assert lines[0] == f"{len(front.points)} of {len(front.tried)} plans, 5 steps each"
    assert "activation bytes, KiB" in lines[1]
    assert f"{front.points[0].cost / 2**10:.4g}" in lines[3]
    assert f"{front.points[0].loss:.4f}" in lines[3]
    assert ", ".join(front.points[0].plan.cuts) in lines[3]


def test_ties_and_plans_that_diverged():
    plan = sedona_fx.Plan()
    points = [
        FrontPoint(plan, cost, loss) for cost, loss in [(2, 1.0), (1, 3.0), (1, 2.0), (3, 1.0), (0, float("inf"))]
    ]
    assert [(p.cost, p.loss) for p in non_dominated(points)] == [(1, 2.0), (2, 1.0)]
    with pytest.raises(SearchDivergedError, match="in every plan"):
        sedona_fx.pareto(net_of(), TRAIN, val_data=VAL, search=Rollout(steps=3, lr=1e30), **QUICK)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"cost": "flops"}, CutError, r"cost='flops' is not known; the nearest names are .*block_flops"),
        ({"search": "sedona"}, CutError, r"search='sedona': the front is made of short runs"),
        ({"blocks": 1}, CutError, r"at least 2 blocks"),
        ({"points": 1}, CutError, r"2 points"),
        ({"cuts": ["1", "2"]}, CutError, r"cuts=... leaves nothing to choose"),
        ({"heads": False}, CutError, r"pareto compares plans by the local losses .* heads=False"),
        ({"loss": None}, DataError, r"data and a loss"),
        ({"budget": {"activation_bytes": 1}}, BudgetError, r"no plan with 3 blocks needs less than"),
    ],
)
def test_bad_input(how, kind, message):
    with pytest.raises(kind, match=message):
        sedona_fx.pareto(net_of(), TRAIN, **{**QUICK, **how})
