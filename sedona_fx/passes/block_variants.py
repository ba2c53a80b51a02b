"""BLOCK -> BLOCK: one block's graph in another form: without its head, or with its base layers among its exports.

Both forms serve schedules that need less or more of a block than its exports and its local output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sedona_fx.ir.graph import INFO, BlockGraph, copy_graph, info, is_head, output_node
from sedona_fx.ir.modules import direct_children
from sedona_fx.ir.outputs import split_local
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes.relax import boundary_record


def without_head(block: BlockGraph) -> BlockGraph:
    """Return a block that computes only its exports.

    Args:
        block: its graph is not changed. The last block, whose local output is the model's own, is returned as it is.
    """
    graph, _ = copy_graph(block.module.graph)
    heads = [node for node in graph.nodes if is_head(node)]
    if not heads:
        return block
    result = output_node(graph)
    exports, local = _exports_and_local(result)
    local = split_local(local)[0]
    assert local in heads, "a block runs its own head only"
    result.args = ((exports, None),)
    for head in heads:
        graph.erase_node(head)
    return dataclasses.replace(block, module=_module(block, graph), boundary=None)


def show_layers(block: BlockGraph, layers: Collection[str]) -> tuple[BlockGraph, tuple[str, ...]]:
    """Return a block that also exports the values at the ends of its base layers.

    Args:
        block: its graph is not changed.
        layers: names of cut points. Those in other blocks are ignored.

    Returns:
        The block, and the names of the added exports in the order of the program. A value that the block overwrites
        later is exported as a clone from before that.
    """
    graph, _ = copy_graph(block.module.graph)
    result = output_node(graph)
    exports, local = _exports_and_local(result)
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    ends = [node for node in body if info(node).cut in layers and info(node).is_tensor]
    shown: dict[str, fx.Node] = dict(zip(block.exports, exports, strict=True))
    names = []
    for end in ends:
        record = info(end)
        site, value = f"{record.site}@layer", end
        if any(info(node).mutates & record.storages for node in graph.nodes if info(node).order > record.order):
            with graph.inserting_after(end):
                value = graph.call_function(torch.clone, (end,))
            value.meta[INFO] = boundary_record(record, site=site, block=record.block)
        shown[site] = value
        names.append(site)
    result.args = ((tuple(shown.values()), local),)
    return dataclasses.replace(block, module=_module(block, graph), exports=tuple(shown)), tuple(names)


def _exports_and_local(result: fx.Node) -> tuple[tuple[fx.Node, ...], Any]:
    """Return the two things that a block returns."""
    returned: Any = result.args[0]
    exports, local = returned
    return exports, local


def _module(block: BlockGraph, graph: fx.Graph) -> fx.GraphModule:
    module = direct_children(Program(block.module, graph, class_name=f"Block{block.index}"))
    return verify(module, Phase.BLOCK)
