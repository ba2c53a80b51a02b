"""Rows of computations: element by element, along some dimensions, sums, products, attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from sedona_fx.ir.graph import operation
from sedona_fx.ir.rows.need import ALL, Needs, Part, Rows, Rule, aligned, argument, rows, shape_of

Dims = Callable[[fx.GraphModule, fx.Node, int], Iterable[int] | None]
"""Returns the dimensions along which an operation mixes, given its rank; None: it cannot tell."""


def elementwise(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """Each number depends on those in its own place, after broadcasting."""
    shape = shape_of(node)
    if shape is None or not isinstance(part, Rows):
        return None
    return {source: aligned(source, part, shape) for source in node.all_input_nodes}


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether PyTorch says of a form of an operator that it works element by element.

    The other forms are on numbers and lists (``add`` has some), but for ``max`` and ``min``, which have rules of their
    own.
    """
    packet = getattr(torch.ops.aten, name.rstrip("_"), None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def extremum(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``max`` and ``min`` of two tensors work element by element; of one, no rule tells."""
    return elementwise(gm, node, part) if len(node.all_input_nodes) > 1 else None


def mixing(dims: Dims) -> Rule:
    """Return the rule of an operation that keeps the shape and mixes along some dimensions; of weights it needs all."""

    def rule(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
        shape, source = shape_of(node), node.args[0] if node.args else None
        if not isinstance(part, Rows) or shape is None or not isinstance(source, fx.Node):
            return None
        own, mixed = shape_of(source), dims(gm, node, len(shape))
        if mixed is None or own is None or len(own) != len(shape):
            return None
        mixes = part.dim in {dim % len(shape) for dim in mixed}
        return {source: ALL if mixes else rows(*part)}

    return rule


def last(gm: fx.GraphModule, node: fx.Node, rank: int) -> Iterable[int]:
    """A linear layer mixes along the last dimension."""
    return (rank - 1,)


def normalized(gm: fx.GraphModule, node: fx.Node, rank: int) -> Iterable[int] | None:
    """LayerNorm mixes along the dimensions that it normalises over."""
    shape: Any
    if node.op == "call_module":
        shape = getattr(gm.get_submodule(str(node.target)), "normalized_shape", None)
    else:
        shape = argument(node, 1, "normalized_shape")
    return range(rank - len(shape), rank) if isinstance(shape, (tuple, list)) else None


def named_dim(gm: fx.GraphModule, node: fx.Node, rank: int) -> Iterable[int] | None:
    """Softmax mixes along the dimension that it is given."""
    if node.op == "call_module":
        dim = getattr(gm.get_submodule(str(node.target)), "dim", None)
    else:
        dim = argument(node, 1, "dim", -1 if operation(node) == "glu" else None)
    return (dim,) if isinstance(dim, int) else None


def reduction(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``x.mean(dims)``: rows of a dimension that is left."""
    source, dims = node.args[0], argument(node, 1, "dim")
    own, shape = shape_of(source), shape_of(node)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(part, Rows) or not isinstance(source, fx.Node) or own is None or shape is None or not dims:
        return None
    reduced = {dim % len(own) for dim in dims}
    left = [dim for dim in range(len(own)) if dim not in reduced or len(own) == len(shape)]
    return {source: rows(left[part.dim], part.places)} if len(left) == len(shape) else None


def product(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``a @ b``, and ``start + a @ b``: rows of the result are rows of `a`, columns are columns of `b`."""
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    shape = shape_of(node)
    if not isinstance(part, Rows) or len(operands) < 2 or shape is None:
        return None
    *start, a, b = operands
    first, second = shape_of(a), shape_of(b)
    if first is None or second is None or min(len(first), len(second)) < 2 or a is b:
        return None
    needs: Needs = {source: aligned(source, part, shape) for source in start}
    if part.dim == len(shape) - 2:
        return {**needs, a: rows(len(first) - 2, part.places), b: ALL}
    if part.dim == len(shape) - 1:
        return {**needs, a: ALL, b: rows(len(second) - 1, part.places)}
    return {**needs, a: aligned(a, part, shape), b: aligned(b, part, shape)}


def attention(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """Queries are needed in the rows of the result, keys and values in all; if it is causal, the first sees itself."""
    query, shape = argument(node, 0, "query"), shape_of(node)
    if not isinstance(part, Rows) or shape is None or not isinstance(query, fx.Node) or part.dim < len(shape) - 2:
        return None
    if part.places == {0} and argument(node, 5, "is_causal", default=False) is not False:
        return None
    others = (argument(node, 1, "key"), argument(node, 2, "value"))
    return {query: rows(*part)} if part.dim == len(shape) - 2 and query not in others else {}
