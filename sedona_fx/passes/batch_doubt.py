"""Whether it is in doubt where the activations of a graph hold the batch, so that tracing a second size is worth it.

Nearly every model keeps the batch in dimension 0 from its inputs to its output, and a second run on fake tensors costs
a fifth of what compiling takes. So it is done where something points to another layout: shapes that do not begin with
the size of the batch at places where a block could end, operators that move dimension 0 where it is as long as
another one, and products of one example with another. A false alarm costs time, and nothing else.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from sedona_fx.ir.graph import TensorSpec, info, operation

_TRANSPOSES = ("t", "T", "H", "numpy_T")
_MATRIX_TRANSPOSES = ("mT", "mH", "adjoint")
_DIMS_FROM_SECOND = ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip")
"""Operators whose dimensions are all their arguments behind the tensor."""
_DIM_SECOND = (
    *("squeeze", "select", "narrow", "index_select", "mean", "sum", "prod", "amax", "amin", "max", "min"),
    *("logsumexp", "std", "var", "median"),
)
_DIM_SECOND_OR_0 = ("cat", "concat", "concatenate", "stack", "unbind", "flatten", "unflatten")
_DIM_THIRD_OR_0 = ("chunk", "split", "tensor_split", "split_with_sizes", "roll")
_PAIRWISE = ("linear", "cdist")
"""Operators that hold every row of one operand against every row of the other."""
_DIM_WORDS = ("dim", "dims", "axis", "dim0", "dim1", "axis0", "axis1", "source", "destination", "start_dim")


def in_doubt(graph: fx.Graph, primary: TensorSpec, size: int) -> bool:
    """Whether some value may hold the batch elsewhere than its first dimension says.

    Args:
        graph: annotated, with crossings counted.
        primary: shape of the primary output.
        size: number of examples in the batch.
    """
    if not primary.shape or not size:  # a loss that the model computes itself: nothing tells where it had the batch
        return False
    if primary.shape[0] != size:
        return True
    total = sum(info(node).flops for node in graph.nodes)
    behind, elsewhere = 0, False  # FLOPs since the last place with the batch first, and whether there are others since
    for node in graph.nodes:
        record = info(node)
        behind += record.flops
        if record.crossing and isinstance(record.value, TensorSpec) and len(record.value.shape) > 1:
            if record.value.shape[0] == size:
                behind, elsewhere = 0, False
            elif record.crossing == 1:
                return True
            else:
                elsewhere = True
        if elsewhere and behind > total / 8:
            return True
        if record.from_input and (_moves_batch(node, size) or _pairs_examples(node, size)):
            return True
    return False


def _shapes(node: fx.Node, *, live: bool = False) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a node reads and that depend on the inputs."""
    records = (info(source) for source in node.all_input_nodes)
    return [
        record.value.shape
        for record in records
        if isinstance(record.value, TensorSpec) and record.from_input and record.value.shape
        if record.is_live or not live
    ]


def _moves_batch(node: fx.Node, size: int) -> bool:
    """Whether a node puts another dimension in the place of the batch, and both are of one size."""
    value = info(node).value
    if not isinstance(value, TensorSpec) or not value.shape or value.shape[0] != size:
        return False
    ranks = [len(shape) for shape in _shapes(node) if shape[0] == size]
    return bool(ranks) and _touches_first(node, ranks[0])


def _touches_first(node: fx.Node, rank: int) -> bool:
    """Whether an operator moves, joins, splits, drops or mixes dimension 0 of its tensor."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = operation(node)
    if name == "getattr":
        name = str(node.args[1])
    if name in _TRANSPOSES:
        return True
    if name in _MATRIX_TRANSPOSES:
        return rank == 2
    if name == "einsum":
        return not _einsum_keeps_first(node.args[0])
    if node.target is operator.getitem:
        key = node.args[1]
        first = key[0] if isinstance(key, tuple) and key else key
        return first is not Ellipsis and first != slice(None)
    named = [value for word, value in node.kwargs.items() if word in _DIM_WORDS]
    if name == "permute":
        order = _ints([*node.args[1:], *named])
        return bool(order) and order[0] % rank != 0
    if name in _DIMS_FROM_SECOND:
        dims = _ints([*node.args[1:], *named])
    elif name in _DIM_SECOND:
        dims = _ints([*node.args[1:2], *named])
    elif name == "unsqueeze":
        return any(dim % (rank + 1) == 0 for dim in _ints([*node.args[1:2], *named]))
    elif name in _DIM_SECOND_OR_0:
        dims = _ints([*node.args[1:2], *named]) or [0]
    elif name in _DIM_THIRD_OR_0:
        dims = _ints([*node.args[2:3], *named]) or [0]
    else:
        return False
    return any(dim % rank == 0 for dim in dims)


def _einsum_keeps_first(equation: Any) -> bool:
    """Whether the first dimension of all operands is the first one of the result."""
    if not isinstance(equation, str) or "->" not in equation:
        return False
    operands, result = equation.replace(" ", "").split("->")
    return all(operand[:1] == result[:1] for operand in operands.split(","))


def _pairs_examples(node: fx.Node, size: int) -> bool:
    """Whether a node may hold examples against each other, which makes two dimensions that grow with the batch."""
    value = info(node).value
    if not isinstance(value, TensorSpec) or len(value.shape) < 2 or value.shape[0] % size:
        return False
    shapes = _shapes(node, live=True)
    if len(shapes) < 2 or all(extent % size for extent in value.shape[1:]):
        return False
    name = operation(node)
    if name == "einsum":
        return not _einsum_keeps_first(node.args[0])
    return name in _PAIRWISE or any(shape[0] != value.shape[0] for shape in shapes)


def _ints(values: Any) -> list[int]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, int) and not isinstance(leaf, bool)]
