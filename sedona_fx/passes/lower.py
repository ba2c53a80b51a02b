"""PRUNED -> LOWERED: real boundaries. Every split point becomes a detach, a head, and a move to the next device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.node import Argument, Target

from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import (
    HEADS,
    SPLIT_POINTS,
    NodeInfo,
    copy_graph,
    info,
    operation,
    output_node,
    split_point_nodes,
)
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint, gated_value


@graph_pass(Phase.LOWERED)
def lower(gm: fx.GraphModule, devices: Sequence[torch.device] | None = None) -> fx.GraphModule:
    """Give every node its block and make every crossing explicit.

    Before: PRUNED. After: LOWERED; nodes stand in the order of their blocks, every live value crosses to later blocks
    through ``detach``, every tensor through ``.to(device)`` where the devices differ, and through ``clone`` where the
    reading block overwrites it. Heads read the undetached activation, in its block. The graph returns
    ``(local output, ..., output)``.

    Args:
        gm: the PRUNED graph; it is not changed. Modules are shared.
        devices: one device a block, or None to move nothing.
    """
    graph, _ = copy_graph(gm.graph)
    lowered = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    splits = split_point_nodes(graph)
    ends = [split.all_input_nodes[0] for split in splits]
    locals_ = [_replace_split(lowered, split, index) for index, split in enumerate(splits)]
    assign_blocks(graph, ends)
    for block, local in enumerate(locals_):
        if local is not None:
            info(local).block = block
    sort_by_block(graph)
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if n.op != "output" and not info(n).boundary]:
        _cross(graph, node, position, devices)
    result = output_node(graph)
    outputs = result.args[0]
    assert isinstance(outputs, tuple)
    result.args = ((*locals_, outputs[-1]),)
    graph.eliminate_dead_code(lambda n: not (info(n).boundary and not n.users))
    if hasattr(lowered, SPLIT_POINTS):
        delattr(lowered, SPLIT_POINTS)
    lowered.recompile()
    return lowered


def assign_blocks(graph: fx.Graph, ends: Sequence[fx.Node]) -> None:
    """Write the block of every node, as :func:`~sedona_fx.ir.flow.block_of` finds it, into its record."""
    for node, block in block_of(graph, ends).items():
        info(node).block = block


def sort_by_block(graph: fx.Graph) -> None:
    """Reorder a graph by block, keeping the order of the program within each; placeholders and output stay."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    anchor = output_node(graph)
    for node in sorted(nodes, key=lambda n: info(n).block or 0):
        anchor.prepend(node)


def _replace_split(gm: fx.GraphModule, split: fx.Node, index: int) -> fx.Node | None:
    """Replace a split point by its head; return the head's call, or None without heads."""
    source = split.all_input_nodes[0]
    point = gm.get_submodule(str(split.target))
    assert isinstance(point, SplitPoint)
    head = None
    if point.heads:
        gm.add_submodule(f"{HEADS}.{index}", point.heads[0])
        with gm.graph.inserting_after(split):
            head = gm.graph.call_module(f"{HEADS}.{index}", (source,))
        head.meta["sedona"] = NodeInfo(path=info(source).path, site=f"{HEADS}.{index}", boundary=True, depends=True)
    for item in list(split.users):
        if item.args[1] == 1:
            assert head is not None
            item.replace_all_uses_with(head)
            gm.graph.erase_node(item)
            continue
        value = gated_value(split, item)
        for clone in [u for u in item.users if u.target is torch.clone and info(u).boundary]:
            clone.replace_all_uses_with(value)
            gm.graph.erase_node(clone)
        item.replace_all_uses_with(value)
        gm.graph.erase_node(item)
    gm.graph.erase_node(split)
    return head


def _cross(
    graph: fx.Graph, node: fx.Node, position: dict[fx.Node, int], devices: Sequence[torch.device] | None
) -> None:
    """Insert what a value needs on its way to later blocks."""
    record = info(node)
    # Every block reads the model's own tensors itself: a shared parameter gets the gradients of all its blocks.
    home = record.block if node.op != "placeholder" else None
    _undo_detach(graph, node)
    readers: dict[int, list[fx.Node]] = {}
    for user in node.users:
        block = info(user).block
        if user.op != "output" and block is not None and (home is None or block != home):
            readers.setdefault(block, []).append(user)
    if not readers:
        return
    carried = node
    if home is not None:
        # A reader that the program has before a write of the home block sinks behind it: keep the old numbers for it.
        writes = [n for n in position if info(n).block == home and info(n).mutates & record.storages]
        soonest = min(info(user).order for users in readers.values() for user in users)
        if record.is_tensor and any(info(write).order > soonest for write in writes):
            seen = [write for write in writes if info(write).order < soonest]
            carried = _insert_after(graph, seen[-1] if seen else node, torch.clone, (node,), home, record)
        if record.is_live and node.op != "get_attr":
            carried = _insert_after(graph, carried, torch.detach, (carried,), home, record)
    for block, users in readers.items():
        entered = carried
        first = min(users, key=position.__getitem__)
        overwrites = record.storages and any(
            info(other).block == block and info(other).mutates & record.storages for other in position
        )
        moved = devices is not None and record.is_tensor and (home is None or devices[home] != devices[block])
        if moved and devices is not None:
            entered = _insert_before(graph, first, "to", (entered, devices[block]), block, record)
        if overwrites and home is not None and not moved and node.op != "get_attr":
            entered = _insert_before(graph, first, torch.clone, (entered,), block, record)
        if entered is not node:
            for user in users:
                user.replace_input_with(node, entered)


def _undo_detach(graph: fx.Graph, node: fx.Node) -> None:
    """Drop the detach of a training-only branch: :func:`_cross` puts one where the value really crosses."""
    for user in list(node.users):
        if info(user).boundary and info(user).training_only and user.target in (torch.detach, torch.clone):
            _undo_detach(graph, user)
            user.replace_all_uses_with(node)
            graph.erase_node(user)


def _made(node: fx.Node, block: int, record: NodeInfo) -> fx.Node:
    node.meta["sedona"] = NodeInfo(
        path=record.path,
        site=f"{record.site}@{operation(node)}{block}",
        order=record.order,
        value=record.value,
        depends=record.depends,
        channel_dim=record.channel_dim,
        block=block,
        boundary=True,
    )
    return node


def _insert_after(
    graph: fx.Graph, node: fx.Node, target: Target, args: tuple[Argument, ...], block: int, record: NodeInfo
) -> fx.Node:
    with graph.inserting_after(node):
        return _made(graph.create_node("call_function", target, args), block, record)


def _insert_before(
    graph: fx.Graph, node: fx.Node, target: Target, args: tuple[Argument, ...], block: int, record: NodeInfo
) -> fx.Node:
    kind = "call_method" if isinstance(target, str) else "call_function"
    with graph.inserting_before(node):
        return _made(graph.create_node(kind, target, args), block, record)
