"""Rules with the largest head: by FLOPs, counted by hand."""

import itertools

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.search import Balanced, Latest, Uniform

BATCH = 2


class Two(nn.Module):
    """Features to scores by way of a hidden layer: 2 N (D H + H S) FLOPs."""

    def __init__(self, features, hidden, scores):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, scores))

    def forward(self, x):
        return self.layers(x)


def narrow(context):
    return Two(context.channels, 2, 3)


def wide(context):
    return Two(context.channels, 64, 3)


def also_wide(context):
    return Two(context.channels, 64, 3)


def flops(features, hidden):
    return 2 * BATCH * (features * hidden + hidden * 3)


def chain():
    torch.manual_seed(0)
    widths = [8, 8, 8, 32, 8, 8, 8, 3]
    return nn.Sequential(*[layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())][:-1])


def decouple(search, heads, blocks=3):
    pair = torch.randn(BATCH, 8), torch.tensor([0, 1])
    return sedona_fx.decouple(chain(), pair, blocks=blocks, search=search, heads=heads)


@pytest.mark.parametrize("rule", [Uniform, Balanced, Latest])
def test_the_largest_head_wherever_it_stands_among_the_candidates(rule):
    for heads in ([narrow, wide], [wide, narrow], [narrow, wide, also_wide]):
        first, largest = decouple(rule(), heads), decouple(rule(head="largest"), heads)
        assert all(name.endswith(heads[0].__qualname__) for name in first.plan.heads)
        assert all(name.endswith(":wide") for name in largest.plan.heads)
        assert largest.plan.provenance["head"] == "largest"
    assert decouple(rule(head="largest"), False).plan.heads == (None, None)
    named = decouple(rule(head="largest"), ["linear", "tokens-3", "tokens-2"])
    assert named.plan.heads == ("tokens-3", "tokens-3")


@pytest.mark.parametrize("rule", [Uniform, Latest])
def test_the_rules_cuts_do_not_depend_on_the_heads(rule):
    assert decouple(rule(head="largest"), [narrow, wide]).plan.cuts == decouple(rule(), [narrow, wide]).plan.cuts


def test_balanced_counts_the_heads_it_takes():
    # By hand: 2 N (D_in D_out) of each layer, and of the head behind it.
    widths = [8, 8, 8, 32, 8, 8, 8, 3]
    layers = [2 * BATCH * a * b for a, b in itertools.pairwise(widths)]
    for head, hidden in (("first", 2), ("largest", 64)):
        net = decouple(Balanced(head=head), [narrow, wide], blocks=2)
        places = len(net.plan.base_layers)
        largest = [
            max(sum(layers[: k + 1]) + flops(widths[k + 1], hidden), sum(layers[k + 1 :])) for k in range(places)
        ]
        assert net.plan.provenance["largest_block"] == min(largest)
        assert net.plan.cuts[0] == net.plan.base_layers[largest.index(min(largest))]


@pytest.mark.parametrize("rule", [Uniform, Balanced, Latest])
def test_a_rule_that_does_not_exist(rule):
    with pytest.raises(ValueError, match=rf"{rule.__name__}\(head='smallest'\): either 'first' or 'largest'"):
        rule(head="smallest")
