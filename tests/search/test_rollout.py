"""Rollout: every plan trains as a net of its own would, what plans share is trained once, the best one stays."""

import copy
import itertools
import json
import math

import pytest
import torch
from captured import captured
from torch import nn
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.errors import CutError, SearchDivergedError, SettingsError
from sedona_fx.report import plan_picture
from sedona_fx.search import Rollout
from sedona_fx.search.problem.problem import local_loss_of
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.proposals import proposals
from sedona_fx.search.trials.tree_cost import tree_cost, tree_cost_of_one
from sedona_fx.train import Greedy

HEADS = ["linear", "sedona-1"]


def net_of(layers=5, drop=0.0):
    torch.manual_seed(0)
    widths = [3, 8, 8, 12, 12, 16, 16][: layers + 1]
    parts = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout(drop))
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def loader(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(count)]


def problem_of(model, blocks=3, data=None):
    return captured(model, data or loader(), blocks=blocks, heads=HEADS, seed=7)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)


def tree_of(problem, plans):
    return PlanTree(problem, plans, sgd, local_loss_of(problem), torch.device("cpu"))


def named(batch):
    return {"input": batch[0]}, batch[1]


def path_to(tree, plan):
    """Return the nodes of one plan, by its definition."""
    nodes = [n for n in tree.nodes() if not n.last and plan[: len(n.choice)] == n.choice]
    return [*nodes, next(n for n in tree.nodes() if n.last and n.choice == plan)]


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_every_plan_trains_as_its_own_net_does(drop):
    model = net_of(drop=drop)
    problem = problem_of(model)
    plans = proposals(problem, 10_000)
    tree = tree_of(problem, plans)
    first = copy.deepcopy(tree)
    data = loader(5, seed=3)
    for step, batch in enumerate(data):
        tree.train(named(batch), step)
    scores = tree.evaluate([named(b) for b in loader(2, seed=4)])
    for plan in plans[::5]:
        cuts, heads = [place for place, _ in plan], [HEADS[k] for _, k in plan]
        net = sedona_fx.decouple(model, data[0], cuts=cuts, heads=heads, seed=7)
        for block, node in zip(net.blocks, path_to(first, plan), strict=True):
            if block.head is not None:
                block.head.load_state_dict(node.head.state_dict())
        greedy = Greedy(net, sgd)
        for x, y in data:
            greedy.step(x, y)
        for block, node in zip(net.blocks, path_to(tree, plan), strict=True):
            for name, value in node.train.module.state_dict().items():
                assert torch.equal(value, net.model.state_dict()[name]), (plan, name)
            if block.head is not None:
                for name, value in node.head.state_dict().items():
                    assert torch.equal(value, block.head.state_dict()[name]), (plan, name)
        net.eval()
        expected = [cross_entropy(net(x), y).item() for x, y in loader(2, seed=4)]
        assert scores[plan] == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_what_plans_share_is_there_once():
    problem = problem_of(net_of())
    plans = proposals(problem, 10_000)
    places = problem.places()
    assert len(plans) == math.comb(len(places), 2) * 4
    assert len(set(plans)) == len(plans)
    tree = tree_of(problem, plans)
    nodes = list(tree.nodes())
    firsts = {plan[:1] for plan in plans}
    assert sum(n.depth == 0 for n in nodes) == len(firsts)
    assert sum(n.depth == 1 for n in nodes) == sum(n.depth == 2 for n in nodes) == len(plans)
    assert sorted(tree.plans()) == sorted(plans)
    weights = [p.data_ptr() for n in nodes for p in n.train.module.parameters()]
    assert len(weights) == len(set(weights))
    whole = tree_cost(problem, tree)
    assert tree_cost_of_one(problem, tree) < whole < sum(tree_cost(problem, tree_of(problem, [p])) for p in plans)
    kept = plans[3:5]
    tree.keep(kept)
    assert sorted(tree.plans()) == sorted(kept)
    assert all(n.children or n.last for n in tree.nodes())


def test_no_model_is_touched_and_the_streams_are_given_back():
    model = net_of()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    first = sedona_fx.decouple(model, loader(), blocks=3, search=Rollout(steps=4), heads=HEADS, progress=False)
    assert torch.equal(stream, torch.get_rng_state())
    torch.rand(3)
    again = sedona_fx.decouple(model, loader(), blocks=3, search=Rollout(steps=4), heads=HEADS, progress=False)
    assert (first.plan.cuts, first.plan.heads) == (again.plan.cuts, again.plan.heads)
    assert first.plan.provenance["rounds"] == again.plan.provenance["rounds"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(first.model.state_dict()[name], value)


def test_the_worse_half_is_dropped_and_the_best_one_stays():
    search = Rollout(steps=8, plans=12)
    net = sedona_fx.decouple(net_of(), loader(), blocks=3, search=search, heads=HEADS, progress=False)
    rounds = net.plan.provenance["rounds"]
    assert [r["step"] for r in rounds] == [2, 4, 8]
    assert [len(r["scores"]) for r in rounds] == [12, 6, 3]
    for before, after in itertools.pairwise(rounds):
        ranked = [plan for plan, _ in before["scores"]]
        assert [s for _, s in before["scores"]] == sorted(s for _, s in before["scores"])
        assert sorted(map(str, (p for p, _ in after["scores"]))) == sorted(map(str, ranked[: len(after["scores"])]))
    best = rounds[-1]["scores"][0][0]
    assert [list(pair) for pair in zip(net.plan.cuts, net.plan.heads, strict=True)] == best
    assert sedona_fx.Plan.from_json(net.plan.to_json()).provenance["rounds"] == rounds


def test_proposals_hold_the_rules_and_no_plan_twice():
    problem = problem_of(net_of())
    places = problem.places()
    some = proposals(problem, 15)
    assert len(some) == len(set(some)) == 15
    cuts = {tuple(place for place, _ in plan) for plan in some}
    assert tuple(places[-2:]) in cuts
    for plan in some:
        positions = [places.index(place) for place, _ in plan]
        assert positions == sorted(set(positions))
        assert all(0 <= k < 2 for _, k in plan)


def test_a_plan_that_diverges_is_dropped_and_all_that_do_are_an_error():
    problem = problem_of(net_of())
    plans = proposals(problem, 10_000)
    tree = tree_of(problem, plans)
    bad = next(n for n in tree.nodes() if n.depth == 0)
    with torch.no_grad():
        next(bad.train.module.parameters()).fill_(float("nan"))
    tree.train(named(loader()[0]), 0)
    scores = tree.evaluate([named(loader()[1])])
    for plan, score in scores.items():
        assert math.isinf(score) == (plan[:1] == bad.choice)
    with pytest.raises(SearchDivergedError):
        sedona_fx.decouple(net_of(), loader(), blocks=3, search=Rollout(steps=4, lr=1e30), heads=HEADS, progress=False)


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def diverging(context):
    """A head whose loss is not a number."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(context.channels, 4), Nan())


def test_a_search_with_a_plan_that_failed_gives_strict_json_that_is_drawn(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    heads = ["linear", diverging]
    net = sedona_fx.decouple(net_of(), loader(), blocks=3, search=Rollout(steps=2), heads=heads, progress=False)
    read = sedona_fx.Plan.from_json(net.plan.to_json())
    assert read == net.plan
    assert read.heads == ("linear", "linear")
    data = json.loads(net.plan.to_json(), parse_constant=refuse)
    for plan, loss in data["provenance"]["rounds"][0]["scores"]:
        assert (loss is None) == any("diverging" in head for _, head in plan)
    assert plan_picture(read, tmp_path / "plan.png").exists()


def test_a_budget_is_kept_or_refused():
    data = loader(20)
    net = sedona_fx.decouple(
        net_of(), data, blocks=3, search=Rollout(training_steps=150, plans=6), heads=["linear"], progress=False
    )
    assert net.plan.provenance["cost"]["equivalent_steps"] <= 150
    with pytest.raises(SettingsError, match="does not pay for a rollout"):
        sedona_fx.decouple(net_of(), data, blocks=3, search=Rollout(training_steps=1), heads=HEADS, progress=False)


def test_shared_parameters_are_refused():
    model = net_of(6)
    model[5][0].weight = model[4][0].weight = nn.Parameter(torch.randn(16, 16, 3, 3) * 0.1)
    model[4][0] = nn.Conv2d(12, 16, 3, padding=1)
    model[5][1] = model[4][1]
    with pytest.raises(CutError, match="share a parameter"):
        sedona_fx.decouple(model, loader(), blocks=4, search=Rollout(steps=2), heads=["linear"], progress=False)


def test_without_heads_or_data_it_says_so():
    with pytest.raises(CutError, match="heads=False"):
        sedona_fx.decouple(net_of(), loader(), blocks=3, search="rollout", heads=False, progress=False)
    with pytest.raises(ValueError, match="at least 1"):
        Rollout(plans=0)
    assert len(sedona_fx.decouple(net_of(), loader(), blocks=1, search="rollout").blocks) == 1
