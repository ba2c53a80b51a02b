"""The graph dialect: phases, what a node knows about itself, and the specification of each phase.

Every pass takes a ``torch.fx.GraphModule`` and returns one; :func:`verify` checks the result against the specification
of its phase, always, in production too. What passes learn about a node is kept in one typed record, :class:`NodeInfo`,
under ``node.meta["sedona"]``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

INFO = "sedona"
"""Key of :class:`NodeInfo` in ``node.meta``."""
SPLIT_POINTS = "sedona_split_points"
"""Module path below which a relaxed or pruned graph keeps its split points."""
HEADS = "sedona_heads"
"""Module path below which a lowered graph keeps its auxiliary heads."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of a tensor that was never computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Size of a contiguous tensor of this shape, in bytes."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass
class NodeInfo:
    """What the passes know about a node. Fields are filled by the pass named in the comment."""

    path: str = ""  # trace: module path of the code that made the node ("" is the model itself)
    site: str = ""  # trace: a name that is the same in the train graph and in the eval graph
    returned_by: tuple[str, ...] = ()  # trace: modules whose output this node is, innermost first
    order: int = 0  # trace: position in the program
    without_grad: str = ""  # trace: the line, if it ran under torch.no_grad(), which a graph forgets
    value: Any = None  # annotate: the value with every tensor replaced by a TensorSpec
    parameters: tuple[str, ...] = ()  # annotate: parameters read by this very node
    weighty: bool = False  # annotate: reads a parameter of two or more dimensions
    depends: bool = False  # annotate: the value depends on parameters
    from_input: bool = False  # annotate: the value depends on the inputs
    flops: int = 0  # annotate: of the forward pass
    saved: dict[int, int] = dataclasses.field(default_factory=dict)  # annotate: storages kept for backward -> bytes
    storages: frozenset[int] = frozenset()  # annotate: storages behind the value
    mutates: frozenset[int] = frozenset()  # annotate: storages that this node overwrites
    channel_dim: int | None = None  # annotate: which dimension holds channels; None where nothing says so
    training_only: bool = False  # crossings: feeds only outputs that exist in training
    crossing: int = 0  # crossings: how many activations cross if a block ends here; 0 where none can end
    cut: str | None = None  # cuts: name of the legal cut point behind this node
    base_layer: bool = False  # cuts: this cut point ends a base layer
    block: int | None = None  # lower: the block that runs this node
    boundary: bool = False  # lower: belongs to a block boundary (detach, clone, device move, head)

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor."""
        return isinstance(self.value, TensorSpec)

    @property
    def is_live(self) -> bool:
        """Whether the value must be isolated when it crosses a boundary: a float that depends on parameters."""
        return self.depends and any(
            isinstance(leaf, TensorSpec) and (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
            for leaf in pytree.tree_leaves(self.value, is_leaf=lambda v: isinstance(v, TensorSpec))
        )


def info(node: fx.Node) -> NodeInfo:
    """Return the record of a node, making an empty one if it has none."""
    record = node.meta.get(INFO)
    if record is None:
        record = node.meta[INFO] = NodeInfo()
    return record


def copy_info(source: fx.Node, target: fx.Node, **changes: Any) -> None:
    """Give ``target`` a copy of the record of ``source``, with some fields changed."""
    record = copy.copy(info(source))
    for name, value in changes.items():
        setattr(record, name, value)
    target.meta[INFO] = record


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph, records included, and say which node became which."""
    copied = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copied.node_copy(node, env.__getitem__)
        copy_info(node, env[node])
    return copied, env


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the one output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def operation(node: fx.Node) -> str:
    """Return what a node calls, by the name that people know: ``add``, also where it is ``aten.add.Tensor``."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def describe(node: fx.Node) -> str:
    """Return the place of a node in the user's own words: ``layer1.0 (add)``."""
    record = info(node)
    if node.op == "call_module":
        return str(node.target)
    return f"{record.path or 'the model itself'} ({operation(node)})"


def cut_points(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes behind which a block may end, in the order of the program."""
    return (node for node in graph.nodes if info(node).cut is not None)


def split_point_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``split_point`` nodes of a RELAXED or PRUNED graph, in order."""
    return [n for n in graph.nodes if n.op == "call_module" and str(n.target).startswith(SPLIT_POINTS + ".")]


def head_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the auxiliary head calls of a LOWERED graph or of a block, in order."""
    return [node for node in graph.nodes if is_head(node)]


def is_head(node: fx.Node) -> bool:
    """Whether a node is a call of an auxiliary head."""
    return node.op == "call_module" and str(node.target).startswith(HEADS + ".")


@dataclass(frozen=True)
class BlockGraph:
    """One block. ``module(*inputs)`` returns ``(exports, local output)``.

    ``inputs`` and ``exports`` name values (by site, so that the names of a train and an eval graph agree): inputs of
    the net, or exports of earlier blocks. Exports are *not* detached;
    who runs the blocks detaches them (or does not: backprop through blocks). ``boundary`` is the export that the head
    reads; None for the last block, whose local output is the model's own output.
    """

    index: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    exports: tuple[str, ...]
    boundary: str | None
    live_exports: tuple[str, ...]
