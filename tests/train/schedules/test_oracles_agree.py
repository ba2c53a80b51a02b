"""The oracles against each other and against plain PyTorch, before anything is held against them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle_backlink import BackLinkOracle
from oracle_backprop import BackpropOracle
from oracle_delayed import DelayedOracle
from oracle_features_replay import FeaturesReplayOracle
from oracle_greedy import GreedyOracle
from oracle_nets import SKIPPING, Skipping, Straight, by_hand, start_of, straight
from oracle_replay import ReplayOracle
from small import batches, head, sgd
from torch import nn

KINDS = {
    "backprop": (BackpropOracle, {}),
    "greedy": (GreedyOracle, {}),
    "backlink": (BackLinkOracle, {"reach": 1}),
    "delayed": (DelayedOracle, {}),
    "features replay": (FeaturesReplayOracle, {}),
    "replay": (ReplayOracle, {"capacity": 2}),
}


class Whole(nn.Module):
    """A model and heads, under the names that a net gives them."""

    def __init__(self, model, heads=0):
        super().__init__()

        class Context:
            channels = 6

        self.model = model
        self.heads = nn.ModuleList(head()(Context) for _ in range(heads))
        self.double()


def seed(k, t):
    torch.manual_seed(1000 * t + k)


def run(kind, whole, hand, data, **options):
    """Return an oracle of a kind after some steps, its losses, and the weights after every step."""
    made, own = KINDS[kind]
    oracle = made(hand, *start_of(whole), seed, **{**own, **options})
    losses, weights = [], []
    for t, (x, y) in enumerate(data):
        seed(0, t)  # for the oracle that draws from the global stream
        losses.append(oracle.step(x, y))
        weights.append({**oracle.w, **oracle.buffers})
    return oracle, losses, weights


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.2, 1), (None, 3), (0.2, 3)])
def test_one_block_is_plain_pytorch(kind, clip, accumulate):
    whole, data = Whole(Skipping(drop=0.3)), batches(9)
    hand = by_hand(SKIPPING, [], [1, 3], drop=0.3)
    _, losses, weights = run(kind, whole, hand, data, clip=clip, accumulate=accumulate)
    model = copy.deepcopy(whole.model)
    optimizer = sgd(model.parameters())
    for t, (x, y) in enumerate(data):
        seed(0, t)
        loss = F.cross_entropy(model(x), y)
        (loss / accumulate).backward()
        near(losses[t], [loss.item()])
        if (t + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        near({name.removeprefix("model."): value for name, value in weights[t].items()}, dict(model.state_dict()))


def test_backlink_of_reach_0_and_replay_without_noise_are_greedy():
    whole, data = Whole(Skipping(drop=0.2), 3), batches(6)
    hand = by_hand(SKIPPING, [1, 3, 5], range(7), drop=0.2)
    greedy = run("greedy", whole, hand, data)
    for kind, options in (("backlink", {"reach": 0}), ("replay", {"capacity": 1}), ("replay", {"capacity": 3})):
        other = run(kind, whole, hand, data, **options)
        near(other[1], greedy[1])
        near(other[2], greedy[2])
    linked = run("backlink", whole, hand, data, reach=1)[2][0]
    moved = {name for name, value in greedy[2][0].items() if not torch.allclose(linked[name], value, rtol=1e-9)}
    assert {name[:14] for name in moved} == {"model.stages.1", "model.stages.3", "model.stages.5"}


def gradients(kind, whole, hand, data):
    """Return the gradients of every step, at weights that stay as they are."""
    oracle = KINDS[kind][0](hand, *start_of(whole), seed)
    found = []
    for x, y in data:
        found.append(oracle.gradients_of(x, y)[0])
        oracle.t += 1
    return found


def test_both_delayed_methods_are_backprop_shifted_where_weights_do_not_move():
    whole, data = Whole(Skipping()), batches(8)
    hand = by_hand(SKIPPING, [1, 3, 5], range(7))
    fresh = gradients("backprop", whole, hand, data)
    for kind in ("delayed", "features replay"):
        late = gradients(kind, whole, hand, data)
        for t in range(8):
            expected = {}
            for k, layers in enumerate(hand.blocks):
                if t >= 3 - k:
                    own = (*(f"model.stages.{i}." for layer in layers for i in layer), *(["model.out"] * (k == 3)))
                    expected |= {name: g for name, g in fresh[t - (3 - k)].items() if name.startswith(own)}
            near(late[t], expected)


# ---- two blocks by hand ---------------------------------------------------------------------------------------------


def test_the_tail_of_backlink_by_hand():
    whole = Whole(Straight(norm=False), 1)
    whole.heads[0][1] = nn.Identity()
    hand = by_hand(straight(4), [1], range(4), norm=False)
    (x, y), s = batches(1)[0], whole.model.stages
    body = s[0](x)
    local = F.cross_entropy(whole.heads[0](s[1](body)), y)
    linked = F.cross_entropy(whole.model.out(s[3](s[2](s[1](body.detach())))), y)
    (local + linked).backward()
    _, _, weights = run("backlink", whole, hand, [(x, y)], reach=1, momentum=0.0, decay=0.0)
    for name, p in whole.named_parameters():
        torch.testing.assert_close((p - weights[0][name]) / 0.1, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["delayed", "features replay"])
def test_two_blocks_with_delay_by_hand(kind):
    """Block 1 is fresh; block 0 takes d f_(t-1)(w(t-1)), or block 1's last gradient through its old input at w(t)."""
    whole, data = Whole(Straight(norm=False)), batches(3)
    hand = by_hand(straight(4), [1], range(4), norm=False)
    _, _, weights = run(kind, whole, hand, data, momentum=0.0, decay=0.0)
    old, delta = None, None
    model = whole.model
    for t, (x, y) in enumerate(data):
        before = copy.deepcopy(model)
        h = model.stages[1](model.stages[0](x)).detach().requires_grad_()
        F.cross_entropy(model.out(model.stages[3](model.stages[2](h))), y).backward()
        if t and kind == "delayed":
            then = copy.deepcopy(old)
            then.zero_grad()
            F.cross_entropy(then(data[t - 1][0]), data[t - 1][1]).backward()
            for p, q in zip(model.stages[:2].parameters(), then.stages[:2].parameters(), strict=True):
                p.grad = q.grad
        elif t:
            model.stages[1](model.stages[0](data[t - 1][0])).backward(delta)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        old, delta = before, h.grad
        near({f"model.{name}": p.detach() for name, p in model.named_parameters()}, weights[t])
