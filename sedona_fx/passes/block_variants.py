"""One block's graph in other forms: without its head, or showing the values behind its base layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sedona_fx.ir.graph import BlockGraph, NodeInfo, copy_graph, info, is_head, output_node
from sedona_fx.ir.modules import direct_children
from sedona_fx.ir.spec import Phase, verify


def without_head(block: BlockGraph) -> BlockGraph:
    """Return a block that computes its exports alone; the last block, whose local output is the model's, as it is."""
    graph, _ = copy_graph(block.module.graph)
    heads = [node for node in graph.nodes if is_head(node)]
    if not heads:
        return block
    result = output_node(graph)
    exports, local = _returned(result)
    assert local in heads, "a block runs its own head only"
    result.args = ((exports, None),)
    for head in heads:
        graph.erase_node(head)
    return dataclasses.replace(block, module=_module(block, graph), boundary=None)


def show_layers(block: BlockGraph, layers: Collection[str]) -> tuple[BlockGraph, tuple[str, ...]]:
    """Return a block that exports the values behind its base layers too, and their names in the order of the program.

    A value that the block overwrites later is copied before that.

    Args:
        block: its graph is not changed.
        layers: names of cut points; those of other blocks are passed over.
    """
    graph, _ = copy_graph(block.module.graph)
    result = output_node(graph)
    exports, local = _returned(result)
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
            value.meta["sedona"] = NodeInfo(
                path=record.path, site=site, order=record.order, value=record.value, depends=record.depends,
                block=record.block, boundary=True,
            )  # fmt: skip
        shown[site] = value
        names.append(site)
    result.args = ((tuple(shown.values()), local),)
    return dataclasses.replace(block, module=_module(block, graph), exports=tuple(shown)), tuple(names)


def _returned(result: fx.Node) -> tuple[tuple[fx.Node, ...], Any]:
    returned: Any = result.args[0]
    exports, local = returned
    return exports, local


def _module(block: BlockGraph, graph: fx.Graph) -> fx.GraphModule:
    module = direct_children(fx.GraphModule(block.module, graph, class_name=f"Block{block.index}"))
    return verify(module, Phase.BLOCK)
