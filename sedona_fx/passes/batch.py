"""TRACED -> TRACED, with crossings counted: where the activations hold the batch, and so where a head could stand.

A head turns the rows of an activation into rows of the output, so it has to know which rows are whose. Mostly both have
the batch in dimension 0. Where that is in doubt (:mod:`sedona_fx.passes.batch_doubt`), the graph is run on fake tensors
for a second size of the batch: the dimension that has grown as the batch did holds it, with the same number of rows for
every example. Where that is more than one, :mod:`sedona_fx.passes.row_order` finds out which rows they are. So a block
may end inside a sequence-first layer (T, N, D), behind ``torch.cat([a, b])``, or in a net that sees frames one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.heads.rows import Rows
from sedona_fx.ir.graph import NodeInfo, TensorSpec, copy_graph, info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase
from sedona_fx.passes.annotate import annotate
from sedona_fx.passes.batch_doubt import in_doubt
from sedona_fx.passes.row_order import Folded, row_orders

GROWTH = 3
"""How many times as large the second batch is: a multiple, since some models split a batch into equal parts."""


@graph_pass(Phase.TRACED)
def batch(gm: fx.GraphModule, evaluation: fx.GraphModule, example: Args | None, *, primary: fx.Node) -> fx.GraphModule:
    """Forbid that a block ends where a head could not tell the examples, and note where they are in the other places.

    Before: TRACED, annotated, with crossings counted. After: the same graph; `crossing` is 0 where the rows of a value
    are no examples. If the batch was in doubt, `grown` holds every value at the second size, and `rows` says of places
    where a block can end, and of the primary output, how they hold the batch.

    Args:
        gm: the train graph; only the records of its nodes change.
        evaluation: the eval graph. It is run on a few examples, if rows are folded.
        example: the batch that the graph was annotated with; None: its size is not free, and what counts is whether
            dimension 0 is as long as that of the output.
        primary: the node of the primary output.
    """
    record = info(primary)
    axis = None
    if example is not None and isinstance(record.value, TensorSpec):
        axis = _second_size(gm, example, primary)
    if example is None or axis is None:
        for node in gm.graph.nodes:
            if info(node).crossing and not _is_batch(info(node).value, record.value):
                info(node).crossing = 0
        return gm
    output = _growing(record, axis.size)
    single = len(output) == 1 and all(output.values())
    (dim, ratio), *_ = output.items() if single else [(0, Fraction(1))]
    unit = min(ratio, Fraction(1))  # rows of the output that count as one example, if it has fewer rows than the batch
    folded: dict[str, Folded] = {record.site: Folded(dim, _whole(ratio / unit) or 1)}
    places: dict[fx.Node, Folded] = {}
    for node in gm.graph.nodes:
        if info(node).crossing:
            place = _place(info(node), axis.size, unit, by_row=not single)
            if place is None:
                info(node).crossing = 0
            else:
                places[node] = place
    folded |= {info(node).site: place for node, place in places.items()}
    orders: dict[str, bool] = {}
    if any(f.each > 1 for f in folded.values()) and single and not axis.dim:
        orders = row_orders(evaluation, example, folded, output=record.site, per_example=unit)
    if single and _whole(ratio / unit) is not None:
        record.rows = _rows(folded[record.site], orders.get(record.site))
        if record.rows is None and not dim and all(place == folded[record.site] for place in places.values()):
            orders = dict.fromkeys(folded, True)  # all have the same rows: whatever their order is, nobody asks for it
            record.rows = _rows(folded[record.site], together=True)
    for node, place in places.items():
        info(node).rows = _rows(place, orders.get(info(node).site))
        if info(node).rows is None:
            info(node).crossing = 0
    return gm


@dataclass(frozen=True)
class _Axis:
    """The dimension of the inputs that holds the batch, and its size."""

    dim: int
    size: int


def _second_size(gm: fx.GraphModule, example: Args, primary: fx.Node) -> _Axis | None:
    """Run the graph for a second size of the batch, if there is doubt; fill in `grown`.

    The batch is the first dimension of the inputs, or, if the output does not depend on its size, the second one.

    Returns:
        Which it is; None if it is not in doubt, or the graph runs for no other size.
    """
    value = info(primary).value
    size = example.batch_size()
    strided = all(tensor.layout is torch.strided for tensor in example.tensors())
    if not strided or (size is not None and not in_doubt(gm.graph, value, size)):
        return None
    found: tuple[_Axis, list[Any]] | None = None
    for axis in _axes(example):
        grown = _values(gm, _enlarged(example, axis))
        if grown is None:
            continue
        if found is None or _last_shape(gm, grown, primary) != value.shape:
            found = axis, grown
        if _last_shape(gm, grown, primary) != value.shape:
            break
    if found is None:
        return None
    for node, spec in zip(gm.graph.nodes, found[1], strict=True):
        info(node).grown = spec
    return found[0]


def _axes(example: Args) -> Iterator[_Axis]:
    """Yield the dimensions of the inputs that may hold the batch."""
    size = example.batch_size()
    if size is not None:
        yield _Axis(0, size)
    seconds = {t.shape[1] if t.dim() > 1 else t.shape[0] for t in example.tensors() if t.dim()}
    if len(seconds) == 1 and any(t.dim() > 1 for t in example.tensors()):
        yield _Axis(1, seconds.pop())


def _enlarged(example: Args, axis: _Axis) -> Args:
    def repeated(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * GROWTH, min(axis.dim, tensor.dim() - 1)) if tensor.dim() else tensor

    return example.map(repeated)


def _values(gm: fx.GraphModule, example: Args) -> list[Any] | None:
    """Return the value of every node for another batch, tensors as specs; None if the graph cannot run on it."""
    graph, copies = copy_graph(gm.graph)
    try:
        annotate(Program(gm, graph, class_name=type(gm).__name__), example.kwargs, training=True, memo={})
    except TraceError:
        return None
    return [info(copies[node]).value for node in gm.graph.nodes]


def _last_shape(gm: fx.GraphModule, grown: list[Any], primary: fx.Node) -> tuple[int, ...] | None:
    value = grown[list(gm.graph.nodes).index(primary)]
    return value.shape if isinstance(value, TensorSpec) else None


def _growing(record: NodeInfo, size: int) -> dict[int, Fraction]:
    """Return the dimensions of a value that have grown, each with its rows an example; 0 if it grew otherwise."""
    before, after = record.value, record.grown
    if not isinstance(before, TensorSpec) or not isinstance(after, TensorSpec) or len(before.shape) != len(after.shape):
        return {}
    pairs = enumerate(zip(before.shape, after.shape, strict=True))
    return {dim: Fraction(a, size) if b == GROWTH * a else Fraction(0) for dim, (a, b) in pairs if a != b}


def _place(record: NodeInfo, size: int, unit: Fraction, *, by_row: bool) -> Folded | None:
    """Return how a value holds the batch; None if no dimension does, or several do and not the first.

    Args:
        record: of a place where a block can end.
        size: number of examples in the batch.
        unit: rows of the output that count as one example.
        by_row: whether every row counts as an example, since it does not matter to which row of the output it belongs.
    """
    growing = _growing(record, size)
    if not growing or len(record.value.shape) < 2 or not all(growing.values()):
        return None
    if len(growing) > 1 and (0 not in growing or growing[0] != unit):
        return None
    dim = 0 if len(growing) > 1 else next(iter(growing))
    each = 1 if by_row else _whole(growing[dim] / unit)
    return Folded(dim, each) if each is not None else None


def _rows(folded: Folded, together: bool | None) -> Rows | None:
    """Return where the examples are; None if it is not known which rows of a folded batch are whose."""
    if folded.each == 1:
        return Rows(folded.dim)
    return Rows(folded.dim, folded.each, together) if together is not None else None


def _whole(number: Fraction) -> int | None:
    return int(number) if number.denominator == 1 and number >= 1 else None


def _is_batch(value: object, primary: object) -> bool:
    """Whether a value is a tensor with one row of features per example, and not, say, all windows of all images."""
    if not isinstance(value, TensorSpec) or len(value.shape) < 2:
        return False
    return not isinstance(primary, TensorSpec) or not primary.shape or value.shape[0] == primary.shape[0]
