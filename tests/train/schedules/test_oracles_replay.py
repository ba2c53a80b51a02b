"""Replay, step by step against an oracle that is written from the rules alone."""

import re

import pytest
import torch
from oracle_cases import CASES, TIED, assert_follows, assert_same_bits, data, make_case, make_oracle
from oracle_replay import ReplayOracle
from small import sgd

from sedona_fx.errors import ScheduleError
from sedona_fx.train import Greedy, Replay, block_seed

NOISE = [0.3, 0.6, 0.2, 0.4]


def skips(noise):
    """Whether worker j skips step t: a draw of its own from (seed, -2-j, t)."""

    def draw(j, t):
        generator = torch.Generator().manual_seed(block_seed(0, -2 - j, t))
        return torch.rand((), dtype=torch.float64, generator=generator).item() < noise[j]

    return draw


def follow(case, pairs, noise, capacity, max_uses=None, check="async", **make):
    """Compare; return the oracle and what the schedule says of itself."""
    net, hand = make_case(case, **make)
    noise = noise[: len(net.blocks)] if isinstance(noise, list) else noise
    schedule = Replay(net, sgd, capacity=capacity, max_uses=max_uses, noise=noise, check=check)
    each = noise if isinstance(noise, list) else [noise] * len(net.blocks)
    oracle = make_oracle(ReplayOracle, net, hand, capacity=capacity, max_uses=max_uses, skips=skips(each))
    assert_follows(schedule, oracle, pairs)
    return oracle, schedule.report()


@pytest.mark.parametrize("make", [{"norm": False}, {"drop": 0.3}], ids=str)
@pytest.mark.parametrize(("capacity", "max_uses"), [(1, None), (3, None), (3, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize("case", CASES)
def test_every_step(case, capacity, max_uses, make):
    oracle, _ = follow(case, data(12), NOISE, capacity, max_uses, **make)
    assert oracle.skipped


@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("noise", [0.0, 0.5, [0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9]], ids=str)
def test_noise_of_all_or_of_one(noise, check):
    oracle, _ = follow("skips", data(24), noise, 3, check=check, drop=0.3)
    assert bool(oracle.skipped) == (noise != 0.0)
    assert bool(oracle.reused) == (noise not in (0.0, [0.0, 0.0, 0.0, 0.9]))


def test_bounded_reuse_starves_the_later_workers():
    free, _ = follow("one stage a block", data(24), [0.8, 0.0, 0.0, 0.0], 3)
    bound, _ = follow("one stage a block", data(24), [0.8, 0.0, 0.0, 0.0], 3, 2)
    assert free.reused > bound.reused > 0
    assert bound.skipped > free.skipped


@pytest.mark.parametrize("noise", [0.0, NOISE], ids=str)
@pytest.mark.parametrize("short", [[1], [2, 3], [7], [5, 11]], ids=str)
def test_short_batches_are_trained_by_worker_0_and_not_stored(short, noise):
    pairs = data(14)
    for t in short:
        pairs[t] = tuple(part[:5] for part in pairs[t])
    oracle, report = follow("skips", pairs, noise, 3, drop=0.3)
    assert oracle.reused
    assert re.search(rf"\b{len(short)} batch(es)? w(as|ere) not stored", report)


def test_without_noise_it_is_greedy_bit_for_bit():
    one, other = (make_case("skips", drop=0.3)[0] for _ in range(2))
    schedules = Replay(one, sgd, capacity=3), Greedy(other, sgd)
    assert_same_bits(*schedules, data(8))


def test_shared_parameters_are_refused_by_name():
    net, _ = make_case("several stages a block", norm=False, tied=TIED)
    with pytest.raises(ScheduleError, match=r"stages\.\d\.0\.(weight|bias).*blocks \["):
        Replay(net, sgd, capacity=3)
