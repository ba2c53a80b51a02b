"""LOWERED or RELAXED -> K blocks: one GraphModule per block, wired by the names of the values that cross.

Schedules train blocks one at a time, on different devices, or a step apart, so each block must be a module that can run
by itself. Blocks of a LOWERED graph are what is trained. Blocks of a RELAXED graph serve a search, which combines the
gradients of its split points itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sedona_fx.ir.graph import (
    SPLIT_POINTS,
    BlockGraph,
    copy_graph,
    copy_info,
    info,
    is_head,
    output_node,
    split_point_nodes,
)
from sedona_fx.ir.modules import direct_children
from sedona_fx.ir.outputs import HEAD_OUTPUT
from sedona_fx.ir.program import Program
from sedona_fx.ir.region import new_graph
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.ir.split_point import gated_value
from sedona_fx.passes.lower import assign_blocks, sort_by_block
from sedona_fx.passes.prune import boundary_clones
from sedona_fx.passes.relax import LOCAL_OUTPUT


def partition(gm: fx.GraphModule) -> list[BlockGraph]:
    """Split a LOWERED graph at its boundaries, or a RELAXED graph at its split points, into block graphs.

    Before: LOWERED or RELAXED. After: K graphs of phase BLOCK, in order; each returns ``(exports, local output)``.

    In blocks of a RELAXED graph the local output is the plain mixture of the heads, computed from the unscaled
    activation. Weighting by p_isolate and p_through is left to the caller, who combines the gradients.

    Args:
        gm: it is not changed. The modules of the blocks are its modules, under the same names, so the ``state_dict`` of
            a block has some of the model's names and never another name.
    """
    graph, _ = copy_graph(gm.graph)
    splits = split_point_nodes(graph)
    if splits:
        assign_blocks(graph, [split.all_input_nodes[0] for split in splits])
        for node in graph.nodes:  # the detach (and clone) before a training-only branch runs in its source's block
            if node.target in (torch.detach, torch.clone) and info(node).boundary and info(node).training_only:
                info(node).block = info(node.all_input_nodes[0]).block
        for index, split in enumerate(splits):
            _replace_split_point(split, index)
        sort_by_block(graph)
    outputs: Any = output_node(graph).args[0]
    count = 1 + max((info(n).block or 0 for n in graph.nodes if n.op not in ("placeholder", "output")), default=0)
    whole = _WholeGraph(gm, graph, count, local_outputs=dict(enumerate(outputs[:-1])), output=outputs[-1])
    return [_block(whole, index) for index in range(count)]


def _replace_split_point(split: fx.Node, index: int) -> None:
    """Replace a split point by marks of what crosses there, and a call of its heads' mixture."""
    graph = split.graph
    for item in list(split.users):
        with graph.inserting_after(split):
            if item.args[1] == LOCAL_OUTPUT:
                new = graph.call_module(f"{split.target}.mixture", split.args[:1])
            else:
                # Only a mark, which :func:`_is_crossing` recognises: no block contains it, and nothing is detached.
                new = graph.call_function(torch.detach, (gated_value(split, item),))
        copy_info(item, new, block=index, boundary=True)
        item.replace_all_uses_with(new)
        for clone in boundary_clones(new):
            info(clone).block = index + 1
        graph.erase_node(item)
    graph.erase_node(split)


@dataclass(frozen=True)
class _WholeGraph:
    """A graph whose nodes all have blocks, and what it returns: block -> its local output, and the model's output."""

    gm: fx.GraphModule
    graph: fx.Graph
    block_count: int
    local_outputs: Mapping[int, fx.Node | None]
    output: Any


def _block(whole: _WholeGraph, index: int) -> BlockGraph:
    """Return one block as a graph of its own."""
    nodes = [node for node in whole.graph.nodes if node.op not in ("placeholder", "output")]
    body = [node for node in nodes if info(node).block == index and not _is_crossing(node)]
    is_last = index == whole.block_count - 1
    reads = dict.fromkeys(_source(argument) for node in body for argument in node.all_input_nodes)
    local = whole.local_outputs.get(index)
    given = _given(whole.graph) if local is not None and is_head(local) else {}
    if is_last:
        fx.map_arg(whole.output, lambda n: reads.setdefault(_source(n)))
    reads.update(dict.fromkeys(given.values()))
    foreign = [source for source in reads if source.op == "placeholder" or info(source).block != index]

    block_graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}  # node of the whole graph -> node of the block
    inputs: list[str] = []
    for source in foreign:
        if source.op != "get_attr":
            name = str(source.target) if source.op == "placeholder" else source.name
            env[source] = block_graph.placeholder(name)
            copy_info(source, env[source])
            inputs.append(info(source).site)
    for source in foreign:
        if source.op == "get_attr":  # every block reads the model's tensors itself
            env[source] = block_graph.node_copy(source)
            copy_info(source, env[source], block=index)
    for node in body:
        env[node] = block_graph.node_copy(node, lambda n: env[_source(n)])
        copy_info(node, env[node])

    exports = [] if is_last else _exports(whole, index, body)
    if is_last:
        result = fx.map_arg(whole.output, lambda n: env[_source(n)])
    else:
        result = env[local] if local is not None else None
        result = {HEAD_OUTPUT: result, **{key: env[node] for key, node in given.items()}} if given else result
    info(block_graph.output((tuple(env[node] for node in exports), result))).block = index
    module = direct_children(Program(whole.gm, block_graph, class_name=f"Block{index}"))
    return BlockGraph(
        index=index,
        module=verify(module, Phase.BLOCK),
        inputs=tuple(inputs),
        exports=tuple(info(node).site for node in exports),
        boundary=info(local.all_input_nodes[0]).site if local is not None else None,
        live_exports=tuple(info(node).site for node in exports if info(node).is_live),
    )


def _given(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Return the fields of the output that heads are given, with their nodes."""
    return {key: _source(node) for node in graph.nodes if not info(node).boundary for key in info(node).given}


def _exports(whole: _WholeGraph, index: int, body: list[fx.Node]) -> list[fx.Node]:
    """Return the values of a block that later blocks, or the graph's outputs, read."""
    later = [node for node in whole.graph.nodes if node.op == "output" or (info(node).block or 0) > index]
    read_later = {_source(argument) for node in later for argument in node.all_input_nodes}
    return [n for n in body if n in read_later and n.op != "get_attr" and not is_head(n) and not _is_mixture(n)]


def _is_crossing(node: fx.Node) -> bool:
    """Whether a node only marks that a value leaves its block."""
    record = info(node)
    return record.boundary and record.depends and node.op == "call_function" and node.target is torch.detach


def _source(node: fx.Node) -> fx.Node:
    """Return the value that a crossing hands on; other nodes are returned as they are."""
    while _is_crossing(node):
        node = node.all_input_nodes[0]
    return node


def _is_mixture(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(SPLIT_POINTS + ".")
