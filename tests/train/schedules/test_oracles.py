"""Backprop, Greedy and BackLink, step by step against slow oracles that are written from the formulas alone."""

import pytest
import torch
from oracle_backlink import BackLinkOracle
from oracle_backprop import BackpropOracle
from oracle_cases import CASES, TIED, assert_follows, assert_same_bits, data, make_case, make_oracle
from oracle_greedy import GreedyOracle
from small import sgd

from sedona_fx.errors import ScheduleError
from sedona_fx.train import BackLink, Backprop, Greedy

SEVERAL = "several stages a block"
PLAIN = {"norm": False}
MIXED = {"drop": 0.3}  # BatchNorm, too


def unchanged_heads(net):
    before = {name: p.clone() for name, p in net.heads.named_parameters()}

    def check():
        for name, p in net.heads.named_parameters():
            assert p.grad is None, name
            assert torch.equal(p, before[name]), name

    return check


# ---- Backprop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_backprop(case, heads):
    net, hand = make_case(case, heads=heads, **MIXED)
    check = unchanged_heads(net)
    assert_follows(Backprop(net, sgd), make_oracle(BackpropOracle, net, hand), data(12))
    check()


@pytest.mark.parametrize("options", [{"clip": 0.2}, {"accumulate": 3}, {"clip": 0.2, "accumulate": 3}], ids=str)
def test_backprop_clips_and_accumulates(options):
    net, hand = make_case(SEVERAL, norm=False, tied=TIED)
    assert_follows(Backprop(net, sgd, **options), make_oracle(BackpropOracle, net, hand, **options), data(12))


# ---- Greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PLAIN, MIXED], ids=str)
@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("case", CASES)
def test_greedy(case, check, make):
    net, hand = make_case(case, **make)
    assert_follows(Greedy(net, sgd, check=check), make_oracle(GreedyOracle, net, hand), data(12))


@pytest.mark.parametrize("tied", [None, TIED], ids=["own", "tied"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.2}, {"accumulate": 3}, {"clip": 0.2, "accumulate": 3}], ids=str)
def test_greedy_clips_accumulates_and_shares(options, tied):
    net, hand = make_case(SEVERAL, norm=False, tied=tied)
    assert_follows(Greedy(net, sgd, **options), make_oracle(GreedyOracle, net, hand, **options), data(12))


# ---- BackLink -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PLAIN, MIXED], ids=str)
@pytest.mark.parametrize(("case", "reach"), [*((SEVERAL, b) for b in range(3)), ("one stage a block", 1)])
def test_backlink(case, reach, make):
    net, hand = make_case(case, **make)
    schedule = BackLink(net, sgd, reach=reach)
    assert_follows(schedule, make_oracle(BackLinkOracle, net, hand, reach=reach), data(12))


@pytest.mark.parametrize("make", [PLAIN, MIXED], ids=str)
@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("reach", [0, 1])
def test_backlink_with_skips(reach, check, make):
    """With reach 1, the value that leaves block 0's body besides carries no gradient of block 1 back."""
    net, hand = make_case("skips", **make)
    schedule = BackLink(net, sgd, reach=reach, check=check)
    assert_follows(schedule, make_oracle(BackLinkOracle, net, hand, reach=reach), data(12))


@pytest.mark.parametrize("tied", [None, TIED], ids=["own", "tied"])
@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("options", [{}, {"clip": 0.2}, {"accumulate": 3}, {"clip": 0.2, "accumulate": 3}], ids=str)
def test_backlink_clips_accumulates_and_shares(options, reach, tied):
    net, hand = make_case(SEVERAL, norm=False, tied=tied)
    oracle = make_oracle(BackLinkOracle, net, hand, reach=reach, **options)
    assert_follows(BackLink(net, sgd, reach=reach, **options), oracle, data(12))


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("reach", [1, 2])
def test_backlink_through_a_frozen_block(reach, frozen):
    net, hand = make_case(SEVERAL, **MIXED)
    for p in net.blocks[frozen].parameters():
        p.requires_grad_(False)
    assert_follows(BackLink(net, sgd, reach=reach), make_oracle(BackLinkOracle, net, hand, reach=reach), data(12))


def test_backlink_of_reach_0_is_greedy_bit_for_bit():
    one, other = (make_case(SEVERAL, **MIXED)[0] for _ in range(2))
    schedules = BackLink(one, sgd, reach=0), Greedy(other, sgd)
    assert_same_bits(*schedules, data(5))


def test_a_link_longer_than_a_block_is_refused():
    with pytest.raises(ScheduleError, match=r"block 0\b.* 2 base layers"):
        BackLink(make_case(SEVERAL)[0], sgd, reach=3)
    with pytest.raises(ScheduleError, match=r"block 1\b.* 1 base layer\b"):
        BackLink(make_case("skips")[0], sgd, reach=2)
