"""Every schedule, as tests that hold for all of them take it."""

from functools import partial

import torch
import torch.nn.functional as F

from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

HEADED = {
    "greedy": Greedy,
    "backlink": partial(BackLink, reach=1),
    "replay": partial(Replay, capacity=2),
}
HEADLESS = {
    "backprop": Backprop,
    "stashed": partial(Delayed, weights="stashed"),
    "current": partial(Delayed, weights="current"),
}
ALL = {**HEADED, **HEADLESS}


def trained(kind, net):
    """Return the names of the parameters of a net that a schedule is to train."""
    return {n for n, p in net.named_parameters() if p.requires_grad and (kind in HEADED or n.startswith("model."))}


def changed(net, before):
    """Return the names of the parameters that are not what they were."""
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


def copies(net):
    """Return copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


class FailsAt:
    """Cross entropy, not finite in the call of that number, counted from 0."""

    def __init__(self, call, value=float("nan")):
        self.call, self.value, self.calls = call, value, 0

    def __call__(self, output, target):
        self.calls += 1
        return F.cross_entropy(output, target) * (self.value if self.calls - 1 == self.call else 1.0)
