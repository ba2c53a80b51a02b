"""Graph networks of PyTorch Geometric: over one large graph, over signals on a fixed graph, over dense small graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, imported

FAMILY, PACKAGE = "torch_geometric", "torch_geometric"
NODES, FEATURES = 24, 8
NEEDS = (PACKAGE,)

NETS: dict[str, dict[str, Any]] = {
    "GCN": {},
    "GraphSAGE": {},
    "GIN": {},
    "GAT": {"heads": 2},
    "EdgeCNN": {},
}
STATIC = ("GCN", "GraphSAGE", "GIN", "ChebConv", "TAGConv", "GraphConv", "ARMAConv")
"""Networks and layers that take a batch of signals over one graph: (batch, nodes, features)."""
ORDERS = {"ChebConv": {"K": 2}}
DENSE = ("DenseGCNConv", "DenseSAGEConv", "DenseGraphConv", "DenseGATConv")


def entries() -> Iterator[Entry]:
    """Yield all of them."""
    for kind, options in NETS.items():
        yield Entry(
            kind,
            FAMILY,
            partial(_net, kind, **options),
            citations,
            note="one graph: its nodes are the examples, and every one depends on its neighbours",
            needs=NEEDS,
        )
    for kind in STATIC:
        yield Entry(
            f"{kind}, fixed graph", FAMILY, partial(OnGraph, kind), sensors, loss=node_loss, needs=NEEDS,
            note="signals over one graph, which the model has as a buffer",
        )  # fmt: skip
    for kind in DENSE:
        yield Entry(kind, FAMILY, partial(Dense, kind), molecules, note="dense graphs of one size", needs=NEEDS)


def _net(kind: str, **options: Any) -> nn.Module:
    sizes = {"in_channels": FEATURES, "hidden_channels": 16, "num_layers": 4, "out_channels": batches.CLASSES}
    return imported("torch_geometric.nn", kind, **sizes, **options)


class OnGraph(nn.Module):
    """A network over one graph that every example shares.

    Args:
        kind: a network of PyTorch Geometric, or one of its layers, which is stacked.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        widths = [FEATURES, 16, 16, 16, batches.CLASSES]
        if kind in NETS:
            self.layers = nn.ModuleList([_net(kind)])
        else:
            pairs = itertools.pairwise(widths)
            options = ORDERS.get(kind, {})
            self.layers = nn.ModuleList([imported("torch_geometric.nn", kind, a, b, **options) for a, b in pairs])
        self.edges: Tensor
        self.register_buffer("edges", edges())

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores for every node, (batch, nodes, classes)."""
        for index, layer in enumerate(self.layers):
            x = layer(F.relu(x) if index else x, self.edges)
        return x


class Dense(nn.Module):
    """Layers over dense graphs, and one class for each graph.

    Args:
        kind: the class of the layers.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        widths = [FEATURES, 16, 16, 16, 16]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList([imported("torch_geometric.nn", kind, a, b) for a, b in pairs])
        self.classifier = nn.Linear(widths[-1], batches.CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Return class scores, (batch, classes)."""
        for layer in self.layers:
            x = layer(x, adjacency).relu()
        return self.classifier(x.mean(1))


def edges() -> Tensor:
    """Return a ring with chords, (2, edges), in both directions."""
    nodes = torch.arange(NODES)
    pairs = [torch.stack([nodes, (nodes + step) % NODES]) for step in (1, 5)]
    one_way = torch.cat(pairs, dim=1)
    return torch.cat([one_way, one_way.flip(0)], dim=1)


def citations() -> tuple[dict[str, Tensor], Tensor]:
    """Return the features of a graph's nodes, its edges, and a class for every node."""
    source = batches.generator()
    x = torch.randn(NODES, FEATURES, generator=source)
    return {"x": x, "edge_index": edges()}, torch.randint(batches.CLASSES, (NODES,), generator=source)


def sensors() -> tuple[Tensor, Tensor]:
    """Return signals over the nodes of the graph, and a class for every node."""
    source = batches.generator()
    x = torch.randn(4, NODES, FEATURES, generator=source)
    return x, torch.randint(batches.CLASSES, (4, NODES), generator=source)


def molecules() -> tuple[dict[str, Tensor], Tensor]:
    """Return small dense graphs, and a class for each."""
    source = batches.generator()
    x = torch.randn(4, 6, FEATURES, generator=source)
    adjacency = (torch.rand(4, 6, 6, generator=source) > 0.5).float()
    return {"x": x, "adjacency": adjacency}, torch.randint(batches.CLASSES, (4,), generator=source)


def node_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of one class a node."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
