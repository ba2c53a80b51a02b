"""The nets that oracles are held against: as modules, and by hand."""

from oracle_common import HandNet
from torch import nn


def stages(count, width, drop, norm):
    """Stages of linear, BatchNorm (or not), tanh and dropout."""
    norms = [[nn.BatchNorm1d(width)] if norm else [] for _ in range(count)]
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), *n, nn.Tanh(), nn.Dropout(drop)) for n in norms)


class Straight(nn.Module):
    """Stages one behind the other."""

    def __init__(self, depth=4, width=6, drop=0.0, norm=True):
        super().__init__()
        self.stages = stages(depth, width, drop, norm)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


class Skipping(nn.Module):
    """Seven stages whose values are read again past the next block.

    Cut behind stages 1, 3 and 5: a and b leave block 0, and a passes blocks 1 and 2 to be read in block 3; c and d
    leave block 1. Block 2 reads the net's input, too. See `SKIPPING` for which stage reads what.
    """

    def __init__(self, width=6, drop=0.0, norm=True):
        super().__init__()
        self.stages = stages(7, width, drop, norm)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        a = self.stages[0](x)
        b = self.stages[1](a)
        c = self.stages[2](b + a)
        d = self.stages[3](c)
        e = self.stages[4](d + c + x)
        f = self.stages[5](e)
        g = self.stages[6](f + a)
        return self.out(g)


SKIPPING = [("x", "a"), ("a", "b"), ("ba", "c"), ("c", "d"), ("dcx", "e"), ("e", "f"), ("fa", "g")]


def straight(depth):
    """The program of `Straight`: each reads what the last one wrote."""
    return [(("x",) if i == 0 else (f"h{i - 1}",), f"h{i}") for i in range(depth)]


def by_hand(program, cuts, base_layers, **options):
    """Return a `HandNet` with blocks cut behind the stages `cuts` and base layers that end behind `base_layers`."""
    blocks, layer = [[]], []
    for i in range(len(program)):
        layer.append(i)
        if i in base_layers or i in cuts or i == len(program) - 1:
            blocks[-1].append(layer)
            layer = []
        if i in cuts:
            blocks.append([])
    return HandNet(program, blocks, **options)


def start_of(net):
    """Return copies of the weights and the buffers of a module, by name."""
    return (
        {name: p.detach().clone() for name, p in net.named_parameters()},
        {name: b.clone() for name, b in net.named_buffers()},
    )
