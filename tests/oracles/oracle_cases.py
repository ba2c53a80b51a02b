"""Nets to hold against their oracles, and the comparison: every step, every parameter, buffer and loss."""

import copy
import functools

import torch
from oracle_nets import SKIPPING, Skipping, Straight, by_hand, start_of, straight
from small import batches, make_net

from sedona_fx.train import block_seed

# Models, the stages behind which they are cut, what they compute, and which stages end base layers.
CASES = {
    "one stage a block": (Straight, {}, [0, 1, 2], straight(4), range(3)),
    "several stages a block": (Straight, {"depth": 9}, [1, 4, 6], straight(9), range(8)),
    "two blocks": (Straight, {}, [1], straight(4), range(3)),
    "skips": (Skipping, {}, [1, 3, 5], SKIPPING, [0, 1, 3, 5]),
}
# Weights of "several stages a block": one in the body of block 0 and in block 3, one in the tails of blocks 0 and 1
# and twice in block 3, a bias in blocks 1 and 2.
TIED = {
    "model.stages.8.0.weight": "model.stages.0.0.weight",
    "model.stages.4.0.weight": "model.stages.1.0.weight",
    "model.stages.3.0.weight": "model.stages.1.0.weight",
    "model.stages.7.0.weight": "model.stages.1.0.weight",
    "model.stages.6.0.bias": "model.stages.2.0.bias",
}


@functools.cache
def _lowered(case, norm, drop, heads):
    kind, options, cuts, _, _ = CASES[case]
    model = kind(norm=norm, drop=drop, **options)
    return make_net(model, cuts=[f"stages.{i}" for i in cuts], norm=norm, drop=drop, heads=heads)


def make_case(case, *, norm=True, drop=0.0, heads=True, tied=None):
    """Return a net and the same net by hand."""
    net = copy.deepcopy(_lowered(case, norm, drop, None if heads else False))
    for name, other in (tied or {}).items():
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, net.get_parameter(other))
    _, _, cuts, program, base_layers = CASES[case]
    assert list(net.plan.base_layers) == [f"stages.{i}" for i in base_layers]
    return net, by_hand(program, cuts, base_layers, norm=norm, drop=drop, tied=tied or {})


def data(count):
    """Return batches of 16: with 8, BatchNorm and dropout make rounding errors grow to 1e-12 within twelve steps."""
    return batches(count, size=16)


def draw(k, t):
    """Seed the draws of block k for batch t, as the schedules promise to."""
    torch.manual_seed(block_seed(0, k, t))


def make_oracle(kind, net, hand, **options):
    """Return an oracle that starts from the weights that a net has now, and trains what requires a gradient there."""
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    return kind(hand, *start_of(net), draw, frozen=frozen, **options)


def assert_follows(schedule, oracle, pairs):
    """Take all steps with both, and compare everything after each: 1e-12 of the largest magnitude in a tensor."""
    for t, (x, y) in enumerate(pairs):
        torch.manual_seed(t)
        losses = [loss.item() for loss in schedule.step(x, y).losses]
        torch.manual_seed(t)
        expected = oracle.step(x, y)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0.0, msg=f"losses of step {t}")
        ours = {**dict(schedule.net.named_parameters()), **dict(schedule.net.named_buffers())}
        theirs = {**oracle.w, **oracle.buffers}
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            error, scale = (ours[name].detach() - value).abs().max().item(), value.abs().max().item()
            assert error <= 1e-12 * scale, f"{name} after step {t} is off by {error}; its largest is {scale}"
    assert oracle.clip is None or oracle.clipped


def assert_same_bits(schedule, other, pairs):
    """Assert that two schedules, each on a net of its own, have the same losses and end at the same state."""
    for x, y in pairs:
        losses = [each.step(x, y).losses for each in (schedule, other)]
        assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    theirs = other.net.state_dict()
    for name, value in schedule.net.state_dict().items():
        assert torch.equal(value, theirs[name]), name
