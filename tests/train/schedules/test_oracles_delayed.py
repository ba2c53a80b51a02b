"""Delayed gradients, both kinds, step by step against oracles that are written from the formulas alone."""

import pytest
import torch
from oracle_cases import CASES, TIED, assert_follows, data, make_case, make_oracle
from oracle_delayed import DelayedOracle
from oracle_features_replay import FeaturesReplayOracle
from small import sgd

from sedona_fx.errors import ScheduleError
from sedona_fx.train import Delayed

ORACLES = {"stashed": DelayedOracle, "current": FeaturesReplayOracle}
SEVERAL = "several stages a block"
WINDOWS = [{}, {"clip": 0.2}, {"accumulate": 3}, {"clip": 0.2, "accumulate": 3}]

pytestmark = pytest.mark.parametrize("weights", ORACLES)


@pytest.mark.parametrize("make", [{"norm": False}, {}, {"norm": False, "drop": 0.3}, {"drop": 0.3}], ids=str)
@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("case", CASES)
def test_every_step(case, check, make, weights):
    net, hand = make_case(case, heads=False, **make)
    assert_follows(Delayed(net, sgd, weights=weights, check=check), make_oracle(ORACLES[weights], net, hand), data(12))


def test_heads_stay_as_they_are(weights):
    net, hand = make_case("skips", drop=0.3)
    before = {name: value.clone() for name, value in net.heads.state_dict().items()}
    assert_follows(Delayed(net, sgd, weights=weights), make_oracle(ORACLES[weights], net, hand), data(12))
    assert all(p.grad is None for p in net.heads.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.heads.state_dict().items())


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("case", [SEVERAL, "skips"])
def test_clips_and_accumulates(case, options, weights):
    net, hand = make_case(case, heads=False, drop=0.3)
    oracle = make_oracle(ORACLES[weights], net, hand, **options)
    assert_follows(Delayed(net, sgd, weights=weights, **options), oracle, data(12))


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_shared_parameters(options, weights):
    """With current weights, the last user's optimizer takes the sum, of as many blocks as have a batch to walk back."""
    net, hand = make_case(SEVERAL, norm=False, heads=False, tied=TIED)
    if weights == "stashed":
        with pytest.raises(ScheduleError, match=r"stages\.\d\.0\.(weight|bias).*blocks \["):
            Delayed(net, sgd, weights=weights, **options)
        return
    oracle = make_oracle(ORACLES[weights], net, hand, **options)
    assert_follows(Delayed(net, sgd, weights=weights, **options), oracle, data(12))


def test_batches_of_other_sizes(weights):
    pairs = data(12)
    pairs[4], pairs[9] = (tuple(part[:5] for part in pairs[t]) for t in (4, 9))
    net, hand = make_case("skips", heads=False, drop=0.3)
    assert_follows(Delayed(net, sgd, weights=weights), make_oracle(ORACLES[weights], net, hand), pairs)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_block_hands_gradients_on(frozen, weights):
    net, hand = make_case("skips", heads=False, drop=0.3)
    for p in net.blocks[frozen].parameters():
        p.requires_grad_(False)
    assert_follows(Delayed(net, sgd, weights=weights), make_oracle(ORACLES[weights], net, hand), data(12))
