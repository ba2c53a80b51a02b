"""What the passes record about a node, and how to read a graph.

Every pass takes a ``torch.fx.GraphModule`` and returns one. What passes find out about a node is kept in one typed
record, :class:`NodeInfo`, under ``node.meta["sedona"]``. :mod:`sedona_fx.ir.spec` has the specification of each phase.
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

from sedona_fx.fake.meter import Work
from sedona_fx.heads.rows import Rows
from sedona_fx.ir.region import INFO as INFO
from sedona_fx.ir.region import Region, new_graph

SPLIT_POINTS = "sedona_split_points"
"""Module path under which a RELAXED or PRUNED graph keeps its split points."""
HEADS = "sedona_heads"
"""Module path under which a LOWERED graph keeps its auxiliary heads."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device, in place of a tensor that is not computed."""

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
    """What the passes recorded about a node. The comment of a field starts with the pass that fills it in."""

    path: str = ""  # trace: path of the module whose code recorded the node ("" for the model itself)
    site: str = ""  # trace: a name that is the same in the train graph and the eval graph
    returned_by: tuple[str, ...] = ()  # trace: the modules that return this node's value, innermost first
    order: int = 0  # trace: position in the program
    sealed: bool = False  # trace: no block can end here: in evaluation the value has another form
    region: Region | None = None  # trace: the autocast or no_grad region that it runs in; None: as the caller runs
    line: str = ""  # trace: the user's line, of a call of torch.autograd.grad
    value: Any = None  # annotate: the value with every tensor replaced by a TensorSpec
    parameters: tuple[str, ...] = ()  # annotate: names of the parameters that this node itself reads
    trained: tuple[str, ...] = ()  # annotate: those of them that require a gradient
    weighty: bool = False  # annotate: it reads a parameter of two or more dimensions
    depends: bool = False  # annotate: the value depends on parameters
    from_input: bool = False  # annotate: the value depends on the inputs
    derives: str = ""  # annotate: how a module kept whole takes derivatives: by "autograd", by a "transform", or not
    flops: int = 0  # annotate: FLOPs of the forward pass, estimated where an operator has no formula
    work: Work = dataclasses.field(default_factory=Work)  # annotate: what its operators did, from which `flops` follows
    hooked: bool = False  # annotate: a module that is kept whole and has hooks on the gradients of what it reads
    saved: dict[int, int] = dataclasses.field(default_factory=dict)  # annotate: storage kept for backward -> bytes
    storages: frozenset[int] = frozenset()  # annotate: storages of the value
    hands_on: bool = False  # annotate: the value is an input itself, or has one in it
    mutates: frozenset[int] = frozenset()  # annotate: storages that this node overwrites
    channel_dim: int | None = None  # annotate: the dimension of the channels; None if unknown
    training_only: bool = False  # crossings: it is used only by outputs that exist in training
    given: tuple[Any, ...] = ()  # analyse: fields of the output that hold this value, which heads are given
    crossing: int = 0  # crossings: activations that cross if a block ends here; 0 if no block can
    grown: Any = None  # batch: the value for a batch three times as large; None if the batch is where it always is
    rows: Rows | None = None  # batch: where the value holds the examples, if `grown` is known and a head may ask for it
    cut: str | None = None  # cuts: name of the cut point after this node, where a cut is legal
    base_layer: bool = False  # cuts: the cut point ends a base layer
    block: int | None = None  # lower: the block that runs this node
    boundary: bool = False  # lower: part of a block boundary (detach, clone, device move, head)

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor."""
        return isinstance(self.value, TensorSpec)

    @property
    def is_complex(self) -> bool:
        """Whether the value is one tensor of complex numbers."""
        return isinstance(self.value, TensorSpec) and self.value.dtype.is_complex

    @property
    def is_live(self) -> bool:
        """Whether the value is a float that depends on parameters, so that a boundary must detach it."""
        return self.depends and any(
            isinstance(leaf, TensorSpec) and (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
            for leaf in pytree.tree_leaves(self.value, is_leaf=lambda v: isinstance(v, TensorSpec))
        )


def info(node: fx.Node) -> NodeInfo:
    """Return the record of a node; an empty one is stored first if it has none."""
    record = node.meta.get(INFO)
    if record is None:
        record = node.meta[INFO] = NodeInfo()
    return record


def copy_info(source: fx.Node, target: fx.Node, **changes: Any) -> None:
    """Give ``target`` a copy of the record of ``source`` in which the fields in ``changes`` have other values."""
    record = copy.copy(info(source))
    for name, value in changes.items():
        setattr(record, name, value)
    target.meta[INFO] = record


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph, records included, and a dictionary from each node to its copy."""
    graph_copy = new_graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = graph_copy.node_copy(node, copies.__getitem__)
        copy_info(node, copies[node])
    return graph_copy, copies


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def operation(node: fx.Node) -> str:
    """Return the common name of what a node calls: ``add`` for ``operator.add`` and for ``aten.add.Tensor``."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def describe(node: fx.Node) -> str:
    """Return the place of a node in terms of the user's model, for messages: ``layer1.0 (add)``."""
    record = info(node)
    if node.op == "call_module":
        return str(node.target)
    return f"{record.path or 'the model itself'} ({operation(node)})"


def cut_points(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes after which a block may end, in the order of the program."""
    return (node for node in graph.nodes if info(node).cut is not None)


def split_point_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of split points of a RELAXED or PRUNED graph, in order."""
    return [node for node in graph.nodes if is_split_point(node)]


def is_split_point(node: fx.Node) -> bool:
    """Whether a node is a call of a split point."""
    return node.op == "call_module" and str(node.target).startswith(SPLIT_POINTS + ".")


def head_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of auxiliary heads of a LOWERED graph or of a block, in order."""
    return [node for node in graph.nodes if is_head(node)]


def is_head(node: fx.Node) -> bool:
    """Whether a node is a call of an auxiliary head."""
    return node.op == "call_module" and str(node.target).startswith(HEADS + ".")


@dataclass(frozen=True)
class BlockGraph:
    """One block of the net. ``module(*inputs)`` returns ``(exports, local output)``.

    Where heads are given fields of the output that hold no gradient, their local output is a dictionary
    (:func:`~sedona_fx.ir.outputs.split_local`).

    Values are named by site, so that the names of a train graph and an eval graph agree. Exports are *not* detached:
    the caller that runs the blocks detaches them, or leaves them attached to backpropagate through the blocks.

    Attributes:
        index: position of the block, from 0.
        module: the graph of the block.
        inputs: names of the values that it reads: inputs of the net, or exports of earlier blocks.
        exports: names of the values that later blocks read.
        boundary: the export that the head reads; None for the last block, whose local output is the model's own output.
        live_exports: the exports that carry a gradient.
    """

    index: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    exports: tuple[str, ...]
    boundary: str | None
    live_exports: tuple[str, ...]
