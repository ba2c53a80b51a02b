"""Memory, counted: how many graphs of each block are alive at once, under each schedule.

A hook behind the first layer of each block multiplies by one and has autograd save a token for it. The token lives as
long as the graph holds what its backward pass needs.
"""

import weakref

import pytest
import torch
from small import batches, make_net, sgd

from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

BLOCKS = range(4)


class Token:
    """What autograd saves instead of a tensor."""

    def __init__(self, tensor, block, step):
        self.tensor, self.block, self.step = tensor, block, step


class Counter:
    """Notes the steps and blocks whose graphs wait for their backward pass, after each block's first layer."""

    def __init__(self, net):
        self.net, self.tokens = net, weakref.WeakSet()
        self.seen, self.at_the_end = [], {}
        for block in BLOCKS:
            net.model.stages[block][0].register_forward_hook(lambda _m, _args, out, block=block: self.save(block, out))
        net.model.out.register_forward_hook(lambda *_: self.at_the_end.update({self.net.steps: self.alive()}))

    def save(self, block, out):
        def pack(tensor):
            token = Token(tensor, block, self.net.steps)
            self.tokens.add(token)
            return token

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
            out = out * torch.ones_like(out)
        self.seen.append((self.net.steps, block, self.alive()))
        return out

    def alive(self):
        """Return, for each block, the steps in which its living graphs were made."""
        return [sorted(token.step for token in self.tokens if token.block == block) for block in BLOCKS]


def count(schedule, steps=8):
    """Train; return what was alive after each step, and the counter."""
    counter, after = Counter(schedule.net), []
    for x, y in batches(steps):
        schedule.step(x, y)
        after.append(counter.alive())
    return after, counter


def last_steps(t, number):
    return list(range(max(0, t - number + 1), t + 1))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_stashing_keeps_one_graph_for_each_batch_that_waits(drop, check, accumulate):
    """Block k, counted from 1, holds K-k+1 when it has run forward; K-k of them wait for the next step.

    With "sync" all blocks hold that many when the last one has run; else each has walked one back by then.
    """
    net = make_net(heads=False, drop=drop)
    after, counter = count(Delayed(net, sgd, weights="stashed", check=check, accumulate=accumulate))
    for t, block, alive in counter.seen:
        assert alive[block] == last_steps(t, 4 - block)
    assert [(t, block) for t, block, _ in counter.seen] == [(t, block) for t in range(8) for block in BLOCKS]
    for t in range(8):
        assert after[t] == [last_steps(t, 3 - k) for k in BLOCKS]
        waited = [last_steps(t, 4 - k) for k in BLOCKS]
        assert counter.at_the_end[t] == (waited if check == "sync" else [*after[t][:3], [t]])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_features_replay_keeps_no_graph(accumulate):
    net = make_net(heads=False, drop=0.3)
    after, counter = count(Delayed(net, sgd, weights="current", accumulate=accumulate))
    assert counter.at_the_end == {t: [[], [], [], [t]] for t in range(8)}
    assert after == [[[]] * 4] * 8
    for t, block, alive in counter.seen:
        assert {step for steps in alive for step in steps} <= {t}
        assert sum(len(steps) for steps in alive) <= 1, f"at block {block} of step {t}: {alive}"
    made = [block for t, block, _ in counter.seen if t == 7]
    assert sorted(made) == [0, 0, 1, 1, 2, 2, 3], "all blocks but the last run again"


@pytest.mark.parametrize(
    ("kind", "options"), [(Greedy, {}), (BackLink, {"reach": 0}), (Replay, {"capacity": 2, "noise": 0.3})]
)
def test_headed_schedules_never_hold_two_blocks_graphs(kind, options):
    after, counter = count(kind(make_net(drop=0.3), sgd, **options))
    assert after == [[[]] * 4] * 8
    for t, block, alive in counter.seen:
        assert alive == [[t] if k == block else [] for k in BLOCKS]


def test_backlink_holds_the_tail_of_one_block_besides():
    after, counter = count(BackLink(make_net(drop=0.3), sgd, reach=1))
    assert after == [[[]] * 4] * 8
    for t, block, alive in counter.seen:
        assert alive[block] == [t]
        assert not any(alive[k] for k in BLOCKS if k not in (block - 1, block))


def test_backprop_holds_all():
    """That the counter counts."""
    after, counter = count(Backprop(make_net(heads=False), sgd))
    assert counter.at_the_end == {t: [[t]] * 4 for t in range(8)}
    assert after == [[[]] * 4] * 8
