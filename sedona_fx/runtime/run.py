"""Run a block's graph on named values, and pass its exports on to the blocks that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import map_tensors

Values = dict[str, Any]
"""Inputs of the net and exports of blocks, by name."""


def run_graph(graph: BlockGraph, values: Mapping[str, Any]) -> tuple[Values, Any]:
    """Run a block's graph.

    Args:
        graph: the block's graph.
        values: at least the values that ``graph.inputs`` names.

    Returns:
        The exports by name, not detached, and the local output.
    """
    exports, local = graph.module(*[values[name] for name in graph.inputs])
    return dict(zip(graph.exports, exports, strict=True)), local


def last_readers(graphs: Iterable[Iterable[BlockGraph]]) -> dict[str, int]:
    """Return, for each value by name, the index of the last block that reads it.

    Args:
        graphs: for each block, the graphs it consists of (one, or several that run one after another).
    """
    return {name: index for index, parts in enumerate(graphs) for graph in parts for name in graph.inputs}


def hand_on(values: Values, exports: Mapping[str, Any], index: int, last_reader: Mapping[str, int]) -> None:
    """Add a block's exports, detached, to the values of the forward pass, and drop those no later block reads.

    Dropping frees each activation as soon as its last reader has run.

    Args:
        values: the values that blocks read, by name; changed in place.
        exports: what block `index` exports.
        index: the block that has just run.
        last_reader: what :func:`last_readers` returned.
    """
    values.update(detached(exports))
    for name in [name for name in values if last_reader.get(name, -1) <= index]:
        del values[name]


def detached(values: Mapping[str, Any]) -> Values:
    """Return named values with every tensor detached from its graph."""
    return {name: map_tensors(Tensor.detach, value) for name, value in values.items()}
