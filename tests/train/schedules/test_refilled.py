"""Loaders may fill the same tensors again and again: what a schedule keeps of a batch is its own."""

import pytest
import torch
from small import batches, make_net, same, sgd
from torch import nn

from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

KINDS = {
    "backprop": Backprop,
    "greedy": Greedy,
    "backlink": lambda net, optimizer: BackLink(net, optimizer, reach=1),
    "stashed": Delayed,
    "current": lambda net, optimizer: Delayed(net, optimizer, weights="current"),
    "replay": lambda net, optimizer: Replay(net, optimizer, capacity=2, noise=[0.0, 0.5, 0.3, 0.2]),
}


class Twice(nn.Module):
    """Later blocks read the input again."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = x
        for stage in self.stages:
            h = torch.tanh(stage(h)) + x
        return self.out(h)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("model", [None, Twice], ids=["chain", "input read again"])
def test_refilled_batches_train_as_fresh_ones_do(kind, model):
    nets = [make_net(model, cuts=None, blocks=4, search="balanced") for _ in range(2)]
    schedules = [kind(net, sgd) for net in nets]
    x, y = (t.clone() for t in batches(1)[0])
    for fresh_x, fresh_y in batches(9):
        schedules[0].step(fresh_x, fresh_y)
        schedules[1].step(x.copy_(fresh_x), y.copy_(fresh_y))
    same(nets[0], nets[1])
