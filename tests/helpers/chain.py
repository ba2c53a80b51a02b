"""A small model in float64 and its graphs of every phase, for the tests of single passes."""

import copy

import torch
from graphs import analysed
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sedona_fx.compile.analyse import Analysed
from sedona_fx.ir.graph import copy_info
from sedona_fx.passes import lower, prune, relax

CUTS = ("a", "b", "c")


class Chain(nn.Module):
    """Four layers, an in-place activation behind each of the first three, and a mask from far away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        keep = x.sum(1, keepdim=True) > -1.0
        x = self.act(self.a(x))
        x = self.act(self.b(x) * self.scale)
        x = self.act(self.c(x))
        return self.d(x * keep)


def batch() -> tuple[Tensor, Tensor]:
    """Return inputs and classes."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def model() -> Chain:
    """Return the model, the same every time."""
    torch.manual_seed(0)
    return Chain().double()


def graphs() -> Analysed:
    """Return its ANALYSED graphs."""
    return analysed(model(), batch()[0])


def heads(count: int) -> dict[str, list[nn.Module]]:
    """Return candidate heads at the three cuts."""
    torch.manual_seed(1)
    widths = {"a": 5, "b": 6, "c": 7}
    return {cut: [nn.Linear(widths[cut], 3).double() for _ in range(count)] for cut in CUTS}


def relaxed(gm: fx.GraphModule, count: int = 2) -> fx.GraphModule:
    """Return the RELAXED graph with two candidates at every cut."""
    return relax(gm, heads(count))


def lowered(gm: fx.GraphModule, **chosen: int) -> fx.GraphModule:
    """Return the LOWERED graph with cuts behind `chosen`."""
    return lower(prune(relaxed(gm), chosen or {"a": 0, "c": 1}))


def text(gm: fx.GraphModule) -> str:
    """Return everything about a graph that a pass may not change in its input."""
    lines = [f"{n.format_node()} {sorted(map(str, n.all_input_nodes))} {n.meta['sedona']}" for n in gm.graph.nodes]
    return "\n".join([*lines, gm.code, *sorted(name for name, _ in gm.named_modules())])


def cross_entropies(outputs: tuple[Tensor, ...], y: Tensor) -> list[Tensor]:
    """Return the loss of every output."""
    return [F.cross_entropy(output, y) for output in outputs]


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy, modules and records included, to be broken."""
    gm = copy.deepcopy(gm)
    for node in gm.graph.nodes:
        copy_info(node, node)
    return gm
