"""Limits: what a block costs is what plain PyTorch says, no decided plan exceeds them, and none is refused wrongly."""

import copy
import dataclasses
import itertools
import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from captured import Capture, captured
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sedona_fx
from sedona_fx import Limits
from sedona_fx.errors import BudgetError, CutError, PlanError
from sedona_fx.heads.registry import build_head
from sedona_fx.report.text import in_units
from sedona_fx.search import Balanced, Latest, Sedona, Uniform, allowed, best_plans
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.rules.uniform import uniform_layers
from sedona_fx.search.sedona.decode import decode, decode_within

MEASURES = ("activation_bytes", "block_flops", "head_flops")


def net_of(widths):
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 3))


def small_head(context):
    return nn.Linear(context.shape[1], 3)


def large_head(context):
    return nn.Sequential(nn.Linear(context.shape[1], 40), nn.ReLU(), nn.Linear(40, 3))


HEADS = [large_head, small_head]
WIDTHS = (6, 20, 4, 30, 12, 8)
BATCH = (torch.linspace(-1, 1, 30).view(5, 6), torch.tensor([0, 1, 2, 0, 1]))
DATA = [BATCH] * 4


def problem_of(widths=WIDTHS, blocks=3, heads=HEADS, **how):
    return captured(net_of(widths), DATA, blocks=blocks, heads=heads, **how)


def kept_bytes(run, *ignored):
    """Return the bytes that autograd keeps of what `run` does, each storage once, parameters left out."""
    known = {t.untyped_storage().data_ptr() for t in ignored}
    kept, alive = {}, []

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        alive.append(run())
    return sum(kept.values())


def by_hand(problem, model):
    """Return costs of every block (a, b, head or None) by running it in plain PyTorch: bytes, FLOPs, FLOPs of heads."""
    places, layers, x = problem.places(), list(model), BATCH[0]
    edges = [-1, *(int(place) for place in places), len(layers) - 1]
    found = {}
    for a, b in itertools.combinations(range(len(edges)), 2):
        block = nn.Sequential(*layers[edges[a] + 1 : edges[b] + 1])
        entered = nn.Sequential(*layers[: edges[a] + 1])(x).detach()
        last = b == len(edges) - 1
        for m in [None] if last else range(len(HEADS)):
            flops, head_flops = FlopCounterMode(display=False), 0
            with flops:
                reached = block(entered)
            size = kept_bytes(lambda block=block, x=entered: block(x), *block.parameters())
            if m is not None:
                head = build_head(HEADS[m], problem.contexts[places[b - 1]])
                with FlopCounterMode(display=False) as counter:
                    head(reached)
                head_flops = counter.get_total_flops()
                leaf = reached.detach().requires_grad_()
                size += kept_bytes(lambda head=head, x=leaf: head(x), *head.parameters(), leaf)
            found[a, b - 1, m] = (size, flops.get_total_flops() + head_flops, head_flops)
    return found


def costs_of(table, plan, places):
    """Return bytes, FLOPs and head FLOPs of a plan, positions and heads, straight from their definition."""
    starts = [0, *(k + 1 for k, _ in plan)]
    blocks = [
        table[at] for at in zip(starts, [*(k for k, _ in plan), places], [*(m for _, m in plan), None], strict=True)
    ]
    return (max(c[0] for c in blocks), max(c[1] for c in blocks), sum(c[2] for c in blocks))


def every_plan(places, cuts):
    for chosen in itertools.combinations(range(places), cuts):
        for heads in itertools.product(range(len(HEADS)), repeat=cuts):
            yield tuple(zip(chosen, heads, strict=True))


def within(costs, limits):
    return all(cost <= limits.get(measure, float("inf")) for cost, measure in zip(costs, MEASURES, strict=True))


def positions(problem, net):
    names = [f"{__name__}:large_head", f"{__name__}:small_head"]
    return tuple((problem.position(c), names.index(h)) for c, h in zip(net.plan.cuts, net.plan.heads, strict=True))


@pytest.fixture(scope="module")
def case():
    problem = problem_of()
    table, places = by_hand(problem, net_of(WIDTHS)), len(problem.places())
    return problem, {plan: costs_of(table, plan, places) for plan in every_plan(places, 2)}


def test_costs_are_those_of_plain_pytorch(case):
    problem, costs = case
    for plan, expected in costs.items():
        assert tuple(plan_costs(problem).value(measure, plan) for measure in MEASURES) == expected
    plan = next(iter(costs))
    cuts, heads = [problem.places()[k] for k, _ in plan], [HEADS[m] for _, m in plan]
    net = sedona_fx.decouple(net_of(WIDTHS), BATCH, cuts=cuts, heads=heads)
    assert (max(c.activation_bytes for c in net.costs), max(c.flops for c in net.costs)) == costs[plan][:2]


class Skips(nn.Module):
    """The input of the second layer is read again by the last ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, x):
        early = x = torch.relu(self.first(x))
        for k, layer in enumerate(self.layers):
            x = torch.relu(layer(x) + early if k > 1 else layer(x))
        return self.last(x * early)


def test_what_far_blocks_share_is_counted_once():
    problem = captured(Skips(), DATA, blocks=3, max_live=2, heads=HEADS)
    places = problem.places()
    for plan in itertools.islice(every_plan(len(places), 2), 0, None, 3):
        cuts, heads = [places[k] for k, _ in plan], [HEADS[m] for _, m in plan]
        net = sedona_fx.decouple(Skips(), BATCH, cuts=cuts, heads=heads, max_live=2)
        expected = max(c.activation_bytes for c in net.costs), max(c.flops for c in net.costs)
        assert tuple(plan_costs(problem).value(measure, plan) for measure in MEASURES[:2]) == expected


@st.composite
def limits_of(draw, costs):
    """Draw limits that some plan just meets, or nearly."""
    given = {}
    for k, measure in enumerate(MEASURES):
        if draw(st.booleans()):
            given[measure] = draw(st.sampled_from(sorted({c[k] for c in costs.values()}))) - draw(st.integers(0, 1))
    return given


def limited(problem, limits):
    """Return the problem with limits, its costs uncounted."""
    problem = dataclasses.replace(problem, limits=Limits(**limits) if limits else None)
    assert not problem.derived
    return problem


def chosen(problem, decision):
    return tuple((problem.position(c), HEADS.index(h)) for c, h in zip(decision.cuts, decision.heads, strict=True))


@pytest.mark.parametrize("rule", ["uniform", "uniform, largest", "latest", "flops", "activation_bytes"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_rules_keep_within_and_are_the_best_that_do(case, rule, data):
    problem, costs = case
    limits = data.draw(limits_of(costs))
    problem, last = limited(problem, limits), len(problem.places())
    possible = [plan for plan, cost in costs.items() if within(cost, limits)]
    search, layers = {
        "uniform": (Uniform(), uniform_layers(last + 1, 3)),
        "uniform, largest": (Uniform(head="largest"), uniform_layers(last + 1, 3)),
        "latest": (Latest(), [last - 2, last - 1]),
        "flops": (Balanced(), None),
        "activation_bytes": (Balanced(by="activation_bytes"), None),
    }[rule]
    if not possible:
        with pytest.raises(BudgetError, match="no plan keeps within the budget"):
            search.decide(problem)
        return
    decision = search.decide(problem)
    plan = chosen(problem, decision)
    # large_head is the first of the candidates, and the largest: that one if any plan of such heads will do.
    first = [plan for plan in possible if not any(m for _, m in plan)] or possible
    assert plan in first
    if layers is not None:
        distances = {p: sum(abs(k - at) for (k, _), at in zip(p, layers, strict=True)) for p in first}
        assert distances[plan] == min(distances.values())
        moved = decision.provenance.get("moved_for_budget", {"distance": 0})
        assert moved["distance"] == distances[plan]
    else:
        k = 1 if rule == "flops" else 0
        assert costs[plan][k] == min(costs[p][k] for p in first) == decision.provenance["largest_block"]


@pytest.mark.parametrize("search", ["uniform", "balanced"])
def test_the_plan_says_what_the_budget_was_and_what_it_costs(case, search):
    problem, costs = case
    limits = dict(zip(MEASURES, sorted(costs.values())[len(costs) // 2], strict=True))
    net = sedona_fx.decouple(net_of(WIDTHS), BATCH, blocks=3, search=search, heads=HEADS, budget=limits)
    plan = positions(problem, net)
    assert within(costs[plan], limits)
    assert net.plan.provenance["budget"] == limits
    assert net.plan.provenance["plan_costs"] == dict(zip(MEASURES, costs[plan], strict=True))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_decoding_and_the_best_plans_within(case, data):
    problem, costs = case
    limits = data.draw(limits_of(costs))
    draw = random.Random(data.draw(st.integers(0, 10**6)))
    problem = limited(problem, limits)
    places = problem.places()
    named = {plan: tuple((places[k], m) for k, m in plan) for plan in costs}
    assert all(allowed(problem, named[plan]) == within(cost, limits) for plan, cost in costs.items())
    alpha = torch.tensor([[draw.gauss(0, 1), draw.gauss(0, 1)] for _ in places])
    beta = [torch.tensor([draw.gauss(0, 1) for _ in HEADS]) for _ in places]
    possible = [plan for plan, cost in costs.items() if within(cost, limits)]
    if not possible:
        with pytest.raises(BudgetError):
            decode_within(problem, alpha, beta)
        return

    def worth(plan):
        odds = sum(alpha[k, 0].item() - alpha[k, 1].item() for k, _ in plan)
        return odds + sum(beta[k].double().softmax(0)[m].log().item() for k, m in plan)

    paper = decode(alpha, beta, 3)
    found = decode_within(problem, alpha, beta)
    plan = tuple(zip(*found, strict=True))
    if within(costs[tuple(zip(*paper, strict=True))], limits):
        assert found == paper
    else:
        assert plan in possible
        assert worth(plan) == pytest.approx(max(map(worth, possible)), abs=1e-9)
    scores = [[draw.choice([0, 1, 2]) for _ in HEADS] for _ in places]
    ranked = sorted((sum(scores[k][m] for k, m in plan), plan) for plan in possible)[:7]
    assert best_plans(problem, scores, 7) == [named[plan] for _, plan in ranked]


def test_the_largest_heads_stay_where_they_may(case):
    _, costs = case
    first, large = min(cost[2] for cost in costs.values()), max(cost[2] for cost in costs.values())
    how = {"blocks": 3, "heads": HEADS[::-1], "search": Uniform(head="largest")}
    for limit, name in ((large - 1, "large_head"), (first, "small_head")):
        net = sedona_fx.decouple(net_of(WIDTHS), BATCH, budget={"head_flops": limit}, **how)
        assert net.plan.heads == (f"{__name__}:{name}",) * 2


def test_sedona_keeps_within_the_budget(case):
    problem, costs = case
    search = Sedona(warmup_steps=1, meta_steps=1, unroll=1)
    how = {"blocks": 3, "search": search, "heads": HEADS, "progress": False}
    free = positions(problem, sedona_fx.decouple(net_of(WIDTHS), DATA, **how))
    for k, measure in enumerate(MEASURES):
        limit = min(cost[k] for cost in costs.values())
        net = sedona_fx.decouple(net_of(WIDTHS), DATA, budget={measure: limit}, **how)
        assert costs[positions(problem, net)][k] <= limit
    loose = sedona_fx.decouple(net_of(WIDTHS), DATA, budget={"head_flops": costs[free][2]}, **how)
    assert positions(problem, loose) == free


def test_a_search_that_knows_no_limits_is_refused_and_not_believed(case):
    with pytest.raises(CutError, match=r"exceeds the budget: head_flops=1,000, but it needs [\d,]+ FLOPs"):
        sedona_fx.decouple(net_of(WIDTHS), DATA, blocks=3, search=Capture(), heads=HEADS, budget={"head_flops": 1000})


def test_a_budget_that_no_plan_meets(case):
    _, costs = case
    least = {measure: min(cost[k] for cost in costs.values()) for k, measure in enumerate(MEASURES)}
    for measure, value in least.items():
        with pytest.raises(BudgetError) as caught:
            sedona_fx.decouple(
                net_of(WIDTHS), BATCH, blocks=3, search="uniform", heads=HEADS, budget={measure: value - 1}
            )
        message = str(caught.value)
        assert f"{measure}={value - 1:,}: no plan with 3 blocks needs less than {value:,} (cuts '" in message
        assert "test_limits:small_head'" in message
        sedona_fx.decouple(net_of(WIDTHS), BATCH, blocks=3, search="uniform", heads=HEADS, budget={measure: value})
    together = {"activation_bytes": least["activation_bytes"], "block_flops": least["block_flops"]}
    if any(within(cost, together) for cost in costs.values()):
        together = {**together, "head_flops": least["head_flops"]}
    assert not any(within(cost, together) for cost in costs.values())
    with pytest.raises(BudgetError, match="Each limit can be met alone, but no plan meets all of them together"):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, blocks=3, search="balanced", heads=HEADS, budget=Limits(**together))
    with pytest.raises(BudgetError, match=r"no plan with 1 blocks needs less than [\d,]+ \(no cut\)"):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, blocks=1, search="uniform", budget={"activation_bytes": 1})


def test_cuts_and_plans_that_exceed_the_budget():
    net = sedona_fx.decouple(net_of(WIDTHS), BATCH, cuts=["1", "2"], heads=HEADS)
    largest = max(c.activation_bytes for c in net.costs)
    budget, enough = {"activation_bytes": largest - 1}, {"activation_bytes": largest}
    message = (
        rf"cuts '1', '2', heads .* exceeds the budget: activation_bytes={largest - 1:,}, but it needs {largest:,} b"
    )
    with pytest.raises(CutError, match=message):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, cuts=["1", "2"], heads=HEADS, budget=budget)
    with pytest.raises(PlanError, match=message):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, plan=net.plan, heads=HEADS, budget=budget)
    again = sedona_fx.decouple(net_of(WIDTHS), BATCH, cuts=["1", "2"], heads=HEADS, budget=enough)
    assert again.plan.provenance["plan_costs"] == enough
    sedona_fx.decouple(net_of(WIDTHS), BATCH, plan=net.plan, heads=HEADS, budget=enough)
    with pytest.raises(CutError, match="heads none, none exceeds"):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, cuts=["1", "2"], heads=False, budget={"block_flops": 1})


def test_seconds_are_measured_once_and_kept(monkeypatch):
    torch.manual_seed(3)
    stream, model = (
        torch.get_rng_state(),
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), *net_of((8, 8, 8))),
    )
    before = copy.deepcopy(model.state_dict())
    torch.set_rng_state(stream)
    how = {"blocks": 2, "search": "balanced", "heads": HEADS}
    net = sedona_fx.decouple(model, BATCH, budget=Limits(block_seconds=60.0), **how)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *net.parameters()))
    plan = sedona_fx.Plan.from_json(net.plan.to_json())
    budget, (spent,) = plan.provenance["budget"], plan.provenance["plan_costs"].values()
    measured = plan.block_seconds
    assert min(measured["stretches"]) > 0
    cut = measured["places"].index(plan.cuts[0])
    sides = sum(measured["stretches"][: cut + 1]) + measured["heads"][plan.cuts[0]][plan.heads[0]]
    assert spent == pytest.approx(max(sides, sum(measured["stretches"][cut + 1 :])))

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("sedona_fx.search.problem.plan_costs.measure_seconds", never)
    again = sedona_fx.decouple(model, BATCH, budget={**budget, "measured": measured}, **how)
    assert again.plan == plan
    sedona_fx.decouple(model, BATCH, plan=plan, heads=HEADS, budget={"block_seconds": spent * 1.01})
    with pytest.raises(PlanError, match="block_seconds"):
        sedona_fx.decouple(model, BATCH, plan=plan, heads=HEADS, budget={"block_seconds": spent * 0.5})


def test_seconds_of_one_head_given_twice():
    twice = {"blocks": 2, "search": "balanced", "heads": [small_head, small_head]}
    net = sedona_fx.decouple(net_of(WIDTHS), BATCH, budget={"block_seconds": 60.0}, **twice)
    assert net.plan.heads == (f"{__name__}:small_head",)


@pytest.mark.parametrize("number", [np.int64(5000), np.uint8(5), np.float32(2.5), np.float64(1e6), Fraction(9, 2)])
@pytest.mark.parametrize("measure", ["activation_bytes", "block_seconds"])
def test_numbers_of_other_libraries_are_numbers(measure, number):
    limits = Limits(**{measure: number})
    kept = getattr(limits, measure)
    assert kept == number
    assert type(kept) is (int if isinstance(number, np.integer) else float)
    assert json.loads(json.dumps(limits.given())) == {measure: number}
    assert limits == Limits(**{measure: kept})


@pytest.mark.parametrize("number", [True, np.True_, np.float32("nan"), np.int8(-1), 1j, np.array([5]), "5"])
def test_what_is_no_amount(number):
    with pytest.raises(CutError, match=r"the budget's activation_bytes=.* should be a number of bytes, at least 0"):
        Limits(activation_bytes=number)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"activation_byte": 3},
            r"names 'activation_byte', which cannot be limited; the nearest names are 'activation_b",
        ),
        ({"activation_bytes": -1}, r"activation_bytes=-1 should be a number of bytes, at least 0"),
        ({"head_flops": "many"}, r"head_flops='many' should be a number of FLOPs"),
        ({"block_seconds": float("nan")}, r"block_seconds=nan should be a number of seconds"),
        (1000, r"budget=1000 is neither sedona_fx.Limits\(...\) nor a mapping"),
        ({"block_seconds": 1, "measured": {"stretches": []}}, r"measured=... should be what a plan has"),
    ],
)
def test_budgets_that_are_none(budget, message):
    with pytest.raises(CutError, match=message):
        sedona_fx.decouple(net_of(WIDTHS), BATCH, blocks=2, search="uniform", budget=budget)


def test_units():
    assert in_units("activation_bytes", [2**20, 3 * 2**21]) == ([1.0, 6.0], "MiB")
    assert in_units("head_flops", [500.0]) == ([500.0], "FLOPs")
    assert in_units("block_flops", [2e6, 3e9]) == ([0.002, 3.0], "GFLOPs")
    assert in_units("block_seconds", [0.25]) == ([250.0], "ms")
    assert in_units("block_seconds", [2.5]) == ([2.5], "s")
