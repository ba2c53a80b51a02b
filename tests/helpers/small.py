"""Small nets of four blocks, and their blocks by hand."""

import copy
import functools

import torch
from torch import nn

import sedona_fx

CUTS = ["stages.0", "stages.1", "stages.2"]


class Chain(nn.Module):
    """`depth` stages of linear, BatchNorm, tanh, dropout, and a linear output."""

    def __init__(self, width=6, depth=4, drop=0.0, norm=True):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(drop)
            )
            for _ in range(depth)
        )
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


class Bare(nn.Module):
    """Four linear stages and an output: to be tied."""

    def __init__(self, width=6):
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        for stage in self.stages:
            x = torch.tanh(stage(x))
        return self.out(x)


def make_tied(**options):
    """Return a net whose blocks 0, 1 and 3 share one weight.

    Tied when the blocks exist: whether a cut may stand between users of one parameter is not for schedules to say.
    """
    net = make_net(Bare, heads="linear", **options)
    for k in (1, 3):
        net.model.stages[k].weight = net.model.stages[0].weight
    return net


def batch(size=8, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, width, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def batches(count, **options):
    return [batch(seed=seed, **options) for seed in range(count)]


def head(drop=0.0, norm=True):
    """Return a factory of heads with BatchNorm and dropout of their own."""

    def factory(context):
        width = context.channels
        return nn.Sequential(
            nn.Linear(width, 5),
            nn.BatchNorm1d(5) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(5, 3),
        )

    return factory


@functools.cache
def _compiled(kind, drop, norm, dtype, heads):
    """Lower a net once; tests get copies (that a copy is as good as the original is a test of its own)."""
    torch.manual_seed(0)
    model = (Chain(drop=drop, norm=norm) if kind is None else kind()).to(dtype)
    return sedona_fx.decouple(model, batch(dtype=dtype), cuts=CUTS, heads=heads or head(drop, norm))


def make_net(model=None, *, cuts=CUTS, drop=0.0, norm=True, dtype=torch.float64, pair=None, heads=None, **options):
    """Return a net of four blocks, from the same weights at every call."""
    if cuts is CUTS and pair is None and not options and heads in (None, "linear") and (model is None or model is Bare):
        return copy.deepcopy(_compiled(model, drop, norm, dtype, heads))
    torch.manual_seed(0)
    if model is None:
        model = Chain(drop=drop, norm=norm)
    elif isinstance(model, type):
        model = model()
    heads = head(drop, norm) if heads is None else heads
    return sedona_fx.decouple(model.to(dtype), pair or batch(dtype=dtype), cuts=cuts, heads=heads, **options)


def by_hand(net):
    """Return copies of the parts of a `Chain` net: [(stage, head), ...], and its output layer."""
    model, heads = copy.deepcopy((net.model, net.heads))
    parts = [(stage, heads[str(k)] if k < len(heads) else model.out) for k, stage in enumerate(model.stages)]
    return model, heads, parts


def same(module, other, tolerance=0.0):
    """Assert that two modules hold the same parameters and buffers."""
    theirs = other.state_dict()
    ours = module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance:
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(value, theirs[name]), name


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)
