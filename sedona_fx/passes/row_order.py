"""Which rows of a folded batch belong to one example, found by running the graph with one example changed.

Shapes say that a value has, of every example, three rows. They do not say which: ``x.flatten(0, 1)`` puts the rows of
an example next to each other, ``torch.cat([a, b, c])`` puts them N apart. So the graph is run on a few real examples,
and again with another one in the place of each of them: the rows that change are its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, fx

from sedona_fx.capture.keep import keep_state
from sedona_fx.data.args import Args
from sedona_fx.ir.graph import copy_graph, copy_info, info, output_node
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.program import Program
from sedona_fx.rng import seed_all

_EXAMPLES = 3
_MOST = 24
"""The graph is run once for each of so many examples at most."""
_CHANGED = 1e-4
"""A row has changed if it has by this part of the largest change: sums may come in another order elsewhere."""


@dataclass(frozen=True)
class Folded:
    """A value that may hold several rows of an example: its dimension of rows, and how many there are an example."""

    dim: int
    each: int


def row_orders(
    gm: fx.GraphModule, example: Args, values: Mapping[str, Folded], *, output: str, per_example: Fraction
) -> dict[str, bool]:
    """Return for folded values whether the rows of an example lie together; those where that is not clear are left out.

    Args:
        gm: an annotated graph, run in eval mode; its state is as before afterwards.
        example: a batch, with the batch first.
        values: site of each value -> how it is folded; that of the output is among them.
        output: site of the primary output, whose rows count as examples if it has fewer rows than the batch.
        per_example: rows of the output an example of the batch, at most 1.
    """
    count = _EXAMPLES * per_example.denominator
    size = int(count * per_example)
    wanted = {info(node).site: node for node in gm.graph.nodes if info(node).site in values}
    if output not in wanted or count > _MOST:
        return {}
    try:
        with keep_modes(gm), keep_state(gm), torch.no_grad():
            gm.eval()
            reader = _reading(gm, list(wanted.values()))
            few = _few(example, count)
            runs = [_run(reader, gm, args) for args in (few, *(_with_another(few, k) for k in range(count)))]
    except Exception:  # the model's own code, on examples that it has not met: then nothing is known
        return {}
    changed: dict[str, list[set[int]]] = {}  # site -> for each example the rows that change with it
    for k, site in enumerate(wanted):
        changed[site] = [_rows_that_differ(runs[0][k], run[k], values[site].dim) for run in runs[1:]]
    members = [{example for example in range(count) if unit in changed[output][example]} for unit in range(size)]
    if per_example == 1:
        if values[output].each == 1 and not all(unit in own for unit, own in enumerate(members)):
            return {}  # examples come out in another order
        members = [{unit} for unit in range(size)]  # whatever else a row of the output depends on
    orders: dict[str, bool] = {}
    for site, folded in values.items():
        if folded.each > 1 and site in changed:
            rows = [set[int]().union(*(changed[site][example] for example in members[unit])) for unit in range(size)]
            order = _order(rows, folded.each)
            if order is not None:
                orders[site] = order
    return orders


def _order(rows: Sequence[set[int]], each: int) -> bool | None:
    """Return whether the rows of an example lie together (True) or apart (False); None if it is neither, or either."""
    if not all(rows):
        return None
    together = all(row // each == example for example, own in enumerate(rows) for row in own)
    apart = all(row % len(rows) == example for example, own in enumerate(rows) for row in own)
    return together if together != apart else None


def _few(example: Args, count: int) -> Args:
    """Return a batch of `count` examples; if there are fewer, some come again."""

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        return tensor[torch.arange(count, device=tensor.device) % len(tensor)]

    return example.map(taken)


def _with_another(args: Args, example: int) -> Args:
    """Return a batch with other values for one example: of the next one, which are sure to be valid, or nearly so."""

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        tensor = tensor.clone()
        other = tensor[(example + 1) % len(tensor)]
        if tensor.is_floating_point() or tensor.is_complex():
            other = other * 1.5 + 0.5
        elif torch.equal(other, tensor[example]):  # such as the zeros that stand for the tokens of a saved net
            other = other.flip(-1) if other.dim() else other
            if torch.equal(other, tensor[example]) and tensor.dtype != torch.bool:
                other = other + 1
        tensor[example] = other
        return tensor

    return args.map(changed)


def _reading(gm: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """Return a graph that returns the values of some nodes, as they are before anything overwrites them."""
    graph, copies = copy_graph(gm.graph)
    result = output_node(graph)
    kept = []
    for node in nodes:
        with graph.inserting_after(copies[node]):
            kept.append(graph.call_method("clone", (copies[node],)))
        copy_info(node, kept[-1], site=f"{info(node).site}@kept")
    result.args = (tuple(kept),)
    return Program(gm, graph, class_name=type(gm).__name__)


def _run(reader: fx.GraphModule, gm: fx.GraphModule, args: Args) -> tuple[Tensor, ...]:
    seed_all(0)
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    values: tuple[Tensor, ...] = reader(*(args.map(torch.clone).kwargs[name] for name in names))
    return values


def _rows_that_differ(first: Tensor, second: Tensor, dim: int) -> set[int]:
    """Return the indices along a dimension at which two tensors differ."""
    difference = (second - first).movedim(dim, 0).abs().float().nan_to_num(0.0)
    largest = difference.reshape(len(difference), -1).amax(1)
    return set((largest > _CHANGED * largest.max()).nonzero().flatten().tolist())
