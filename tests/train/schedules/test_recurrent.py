"""Recurrent layers under delayed gradients: they keep a list of their weights aside, which must be stashed, too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import make_net, same, sgd
from torch import nn

from sedona_fx.train import Delayed, block_seed


class States(nn.Module):
    """The states of a recurrent layer, without the last one by itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its weights aside, and a GRU with dropout between its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.lstm = nn.Linear(4, 6), States(nn.LSTM(6, 6, batch_first=True, bidirectional=True))
        self.gru, self.out = States(nn.GRU(12, 6, num_layers=2, dropout=0.3, batch_first=True)), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.gru(self.lstm(self.a(x))))[:, -1]


def sequences(count):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 8, 5, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(0, 3, (count, 8), generator=generator), strict=True))


@pytest.mark.parametrize("stash", [True, False], ids=["stashed", "current"])
def test_recurrent_layers_walk_back_at_the_weights_of_their_batch(stash):
    data = sequences(10)
    net = make_net(Recurrent(), pair=data[0], cuts=["a", "lstm", "gru"], heads=False)
    model, names = copy.deepcopy(net.model), ["a", "lstm", "gru", "out"]
    owned = [list(getattr(model, name).parameters()) for name in names]
    optimizers = [sgd(params) for params in owned]
    inputs, gradients, weights = {}, {}, {}
    for t, (x, y) in enumerate(data):
        weights[t], h = copy.deepcopy(model), x
        for k, name in enumerate(names):
            inputs[k, t] = h.detach()
            torch.manual_seed(block_seed(0, k, t))
            h = getattr(model, name)(inputs[k, t])
        for k, name in enumerate(names):
            s = t - (3 - k)
            if s < 0:
                continue
            block = getattr(weights[s] if stash else model, name)
            leaf = inputs[k, s].clone().requires_grad_()
            torch.manual_seed(block_seed(0, k, s))
            out = block(leaf)
            root = F.cross_entropy(out[:, -1], y) if k == 3 else out
            params = list(block.parameters())
            *found, gradients[k, s] = torch.autograd.grad(
                root, [*params, leaf], None if k == 3 else gradients[k + 1, s]
            )
            for p, g in zip(owned[k], found, strict=True):
                p.grad = g
        for k, optimizer in enumerate(optimizers):
            if t >= 3 - k:
                optimizer.step()
    schedule = Delayed(net, sgd, weights="stashed" if stash else "current")
    for x, y in data:
        schedule.step(x, y)
    same(net.model, model, 1e-12)
