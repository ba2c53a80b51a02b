"""LOWERED or RELAXED -> K blocks: one GraphModule a block, wired by the names of the values that cross."""

from __future__ import annotations

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
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.ir.split_point import gated_value
from sedona_fx.passes.lower import assign_blocks, sort_by_block


def partition(gm: fx.GraphModule) -> list[BlockGraph]:
    """Split a LOWERED graph at its boundaries, or a RELAXED graph at its split points, into block graphs.

    The modules of the blocks are those of `gm`, under the same names: a block's ``state_dict`` has some of the model's
    names, never another name. In blocks of a RELAXED graph the local output is the plain mixture of the heads on the
    unscaled activation; weighting by p_isolate and p_through is left to who combines the gradients.
    """
    graph, _ = copy_graph(gm.graph)
    splits = split_point_nodes(graph)
    if splits:
        assign_blocks(graph, [split.all_input_nodes[0] for split in splits])
        for node in graph.nodes:  # a training-only branch reads what its source's block has detached (and cloned)
            if node.target in (torch.detach, torch.clone) and info(node).boundary and info(node).training_only:
                info(node).block = info(node.all_input_nodes[0]).block
        for index, split in enumerate(splits):
            _ungate(graph, split, index)
        sort_by_block(graph)
    result = output_node(graph)
    outputs = result.args[0]
    assert isinstance(outputs, tuple)
    count = 1 + max((info(n).block or 0 for n in graph.nodes if n.op not in ("placeholder", "output")), default=0)
    local_nodes = dict(enumerate(outputs[:-1]))
    return [_block(gm, graph, index, count, local_nodes.get(index), outputs[-1]) for index in range(count)]


def _ungate(graph: fx.Graph, split: fx.Node, index: int) -> None:
    """Replace a split point by a marked crossing and its heads' mixture."""
    for item in list(split.users):
        with graph.inserting_after(split):
            if item.args[1] == 1:
                new = graph.call_module(f"{split.target}.mixture", split.args[:1])
            else:
                new = graph.call_function(torch.detach, (gated_value(split, item),))  # a mark; nothing is detached
        copy_info(item, new, block=index, boundary=True)
        item.replace_all_uses_with(new)
        for clone in [u for u in new.users if u.target is torch.clone and info(u).boundary]:
            info(clone).block = index + 1
        graph.erase_node(item)
    graph.erase_node(split)


def _crossing(node: fx.Node) -> bool:
    """Whether a node only marks that a value leaves its block."""
    record = info(node)
    return record.boundary and record.depends and node.op == "call_function" and node.target is torch.detach


def _source(node: fx.Node) -> fx.Node:
    while _crossing(node):
        node = node.all_input_nodes[0]
    return node


def _block(
    gm: fx.GraphModule, graph: fx.Graph, index: int, count: int, local: fx.Node | None, output: Any
) -> BlockGraph:
    new, env, inputs = fx.Graph(), {}, list[str]()
    body = [
        n for n in graph.nodes if n.op not in ("placeholder", "output") and info(n).block == index and not _crossing(n)
    ]
    last = index == count - 1
    wanted: dict[fx.Node, None] = {}
    for node in body:
        for argument in node.all_input_nodes:
            wanted[_source(argument)] = None
    if last:
        fx.map_arg(output, lambda n: wanted.setdefault(_source(n)))
    foreign = [source for source in wanted if source.op == "placeholder" or info(source).block != index]
    for source in foreign:
        if source.op != "get_attr":
            env[source] = new.placeholder(str(source.target) if source.op == "placeholder" else source.name)
            copy_info(source, env[source])
            inputs.append(info(source).site)
    for source in foreign:
        if source.op == "get_attr":  # every block reads the model's tensors itself
            env[source] = new.node_copy(source)
            copy_info(source, env[source], block=index)
    for node in body:
        env[node] = new.node_copy(node, lambda n: env[_source(n)])
        copy_info(node, env[node])
    later = [n for n in graph.nodes if n.op == "output" or (info(n).block or 0) > index]
    read = {_source(a) for n in later if not _crossing(n) or _source(n) is not n for a in n.all_input_nodes}
    if not last:
        read -= {local} if local is not None else set()
    leaving = [n for n in body if n in read and n.op != "get_attr"] if not last else []
    exported = [n for n in leaving if not is_head(n) and not _is_mixture(n)]
    result = fx.map_arg(output, lambda n: env[_source(n)]) if last else (env[local] if local is not None else None)
    done = new.output((tuple(env[n] for n in exported), result))
    info(done).block = index
    module = direct_children(fx.GraphModule(gm, new, class_name=f"Block{index}"))
    end = local.all_input_nodes[0] if local is not None else None
    return BlockGraph(
        index=index,
        module=verify(module, Phase.BLOCK),
        inputs=tuple(inputs),
        exports=tuple(info(n).site for n in exported),
        boundary=info(end).site if end is not None else None,
        live_exports=tuple(info(n).site for n in exported if info(n).is_live),
    )


def _is_mixture(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(SPLIT_POINTS + ".")
