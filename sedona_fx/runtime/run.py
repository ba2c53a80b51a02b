"""Run a block's graph on named values, and hand what it made to the blocks that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import map_tensors


def run_graph(graph: BlockGraph, values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Run a block's graph on named values; return its exports by name, undetached, and its local output."""
    exports, local = graph.module(*[values[name] for name in graph.inputs])
    return dict(zip(graph.exports, exports, strict=True)), local


Values = dict[str, Any]


def last_readers(graphs: Iterable[Iterable[BlockGraph]]) -> dict[str, int]:
    """Return the last block that reads each value, for blocks of one or more graphs."""
    return {name: index for index, parts in enumerate(graphs) for graph in parts for name in graph.inputs}


def hand_on(values: Values, exports: Mapping[str, Any], index: int, last_reader: Mapping[str, int]) -> None:
    """Add the exports of block `index`, cut off from its graph, and drop what no later block reads."""
    values.update(detached(exports))
    for name in [name for name in values if last_reader.get(name, -1) <= index]:
        del values[name]


def detached(values: Mapping[str, Any]) -> Values:
    """Cut named values off from their graphs."""
    return {name: map_tensors(Tensor.detach, value) for name, value in values.items()}
