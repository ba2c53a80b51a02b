"""PRUNED -> LOWERED: every split point becomes a real boundary: a detach, a head, and a move to the next device.

In a PRUNED graph it is decided where blocks end, but gradients still flow through. Here every node gets its block, and
every value that crosses from one block to a later one does so through nodes that can be seen: nothing that happens at
a boundary is left to whoever runs the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.fx.node import Argument, Target

from sedona_fx.capture.whole.derivatives import with_gradient
from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import (
    HEADS,
    INFO,
    SPLIT_POINTS,
    NodeInfo,
    copy_graph,
    info,
    operation,
    output_node,
    split_point_nodes,
)
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint
from sedona_fx.passes.prune import bypass
from sedona_fx.passes.relax import LOCAL_OUTPUT, boundary_record


@graph_pass(Phase.LOWERED)
def lower(gm: fx.GraphModule, devices: Sequence[torch.device] | None = None) -> fx.GraphModule:
    """Give every node its block and make every crossing explicit.

    Before: PRUNED. After: LOWERED, that is

    - nodes stand in the order of their blocks;
    - every live value crosses to later blocks through ``detach``, every tensor through ``.to(device)`` where the
      devices differ, and through ``clone`` where the reading block overwrites it;
    - what a module with hooks on gradients reads requires a gradient there, as it does in the model;
    - heads read the undetached activation, in its block;
    - the graph returns ``(local output, ..., output)``.

    Args:
        gm: it is not changed. Modules are shared.
        devices: one device per block, or None to move nothing.
    """
    graph, _ = copy_graph(gm.graph)
    lowered = Program(gm, graph, class_name=type(gm).__name__)
    splits = split_point_nodes(graph)
    ends = [split.all_input_nodes[0] for split in splits]
    head_calls = [_replace_by_head(lowered, split, index) for index, split in enumerate(splits)]
    assign_blocks(graph, ends)
    for block, head_call in enumerate(head_calls):
        if head_call is not None:
            info(head_call).block = block
    sort_by_block(graph)
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if n.op != "output" and not info(n).boundary]:
        _cross(node, position, devices)
    result = output_node(graph)
    outputs = result.args[0]
    assert isinstance(outputs, tuple)
    result.args = ((*head_calls, outputs[-1]),)
    graph.eliminate_dead_code(lambda n: not (info(n).boundary and not n.users))
    if hasattr(lowered, SPLIT_POINTS):
        delattr(lowered, SPLIT_POINTS)
    lowered.recompile()
    return lowered


def assign_blocks(graph: fx.Graph, ends: Sequence[fx.Node]) -> None:
    """Write the block of every node into its record.

    Args:
        graph: in the order of the program.
        ends: the nodes at which blocks end, in order, without the last block's. Which node belongs to which block, see
            :func:`~sedona_fx.ir.flow.block_of`.
    """
    for node, block in block_of(graph, ends).items():
        info(node).block = block


def sort_by_block(graph: fx.Graph) -> None:
    """Reorder a graph by block, keeping the order within each block; placeholders stay first and the output last."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    result = output_node(graph)
    for node in sorted(nodes, key=lambda n: info(n).block or 0):
        result.prepend(node)


def _replace_by_head(gm: fx.GraphModule, split: fx.Node, index: int) -> fx.Node | None:
    """Replace a split point by a call of its head; return the call, or None for a split point without heads."""
    source = split.all_input_nodes[0]
    point = gm.get_submodule(str(split.target))
    assert isinstance(point, SplitPoint)
    head_call = None
    if point.heads:
        name = f"{HEADS}.{index}"
        gm.add_submodule(name, point.heads[0])
        with gm.graph.inserting_after(split):
            head_call = gm.graph.call_module(name, (source,))
        head_call.meta[INFO] = NodeInfo(path=info(source).path, site=name, boundary=True, depends=True)
    for item in list(split.users):
        if item.args[1] == LOCAL_OUTPUT:
            assert head_call is not None
            item.replace_all_uses_with(head_call)
            gm.graph.erase_node(item)
        else:
            bypass(split, item)
    gm.graph.erase_node(split)
    return head_call


def _cross(node: fx.Node, position: Mapping[fx.Node, int], devices: Sequence[torch.device] | None) -> None:
    """Insert the nodes through which a value crosses from its block to later ones.

    Args:
        node: computes the value.
        position: node -> position in the graph, for all nodes that were there before crossings were inserted.
        devices: one device per block, or None.
    """
    _undo_detach(node)
    home = _home(node)
    readers: dict[int, list[fx.Node]] = {}
    for user in node.users:
        block = info(user).block
        if user.op != "output" and block is not None and (home is None or block != home):
            readers.setdefault(block, []).append(user)
    if not readers:
        return
    carried = _leave(node, home, readers, position) if home is not None else node
    for block, users in readers.items():
        entered = _enter(node, carried, block, users, position=position, devices=devices)
        if entered is not node:
            for user in users:
                user.replace_input_with(node, entered)


def _home(node: fx.Node) -> int | None:
    """Return the block that a value leaves when it crosses; None for an input of the graph: it only enters blocks."""
    return info(node).block if node.op != "placeholder" else None


def _leave(
    node: fx.Node, home: int, readers: Mapping[int, Sequence[fx.Node]], position: Mapping[fx.Node, int]
) -> fx.Node:
    """Insert into a value's own block what it needs to leave it; return what later blocks read."""
    graph, record, carried = node.graph, info(node), node
    # Where the program reads the value before its own block overwrites it, the reading block now runs after that write:
    # a clone keeps the old numbers for it.
    writes = [n for n in position if info(n).block == home and info(n).mutates & record.storages]
    first_read = min(info(user).order for users in readers.values() for user in users)
    if record.is_tensor and any(info(write).order > first_read for write in writes):
        writes_before = [write for write in writes if info(write).order < first_read]
        with graph.inserting_after(writes_before[-1] if writes_before else node):
            carried = _add(graph, torch.clone, (node,), record, home)
    # Every block reads the model's own tensors itself, so that a shared parameter gets the gradients of all its blocks.
    if record.is_live and node.op != "get_attr":
        with graph.inserting_after(carried):
            carried = _add(graph, torch.detach, (carried,), record, home)
    return carried


def _enter(
    node: fx.Node,
    carried: fx.Node,
    block: int,
    users: Sequence[fx.Node],
    *,
    position: Mapping[fx.Node, int],
    devices: Sequence[torch.device] | None,
) -> fx.Node:
    """Insert into a block what a value needs to enter it; return what the block's readers of the value read."""
    graph, record, home = node.graph, info(node), _home(node)
    first_user = min(users, key=position.__getitem__)
    moves = devices is not None and record.is_tensor and (home is None or devices[home] != devices[block])
    overwrites = any(info(n).block == block and info(n).mutates & record.storages for n in position)
    from_block = home is not None and node.op != "get_attr"
    hooked = from_block and record.is_tensor and record.is_live and _reach_hooks(users)
    with graph.inserting_before(first_user):
        if moves and devices is not None:
            carried = _add(graph, "to", (carried, devices[block]), record, block)
        if hooked:
            carried = _add(graph, with_gradient, (carried,), record, block)
        if overwrites and from_block and (hooked or not moves):
            carried = _add(graph, torch.clone, (carried,), record, block)
    return carried


def _reach_hooks(readers: Sequence[fx.Node]) -> bool:
    """Whether a module with hooks on the gradients of what it reads is computed from these nodes, in their block."""
    seen, stack = set[fx.Node](), list(readers)
    while stack:
        node = stack.pop()
        if node in seen or info(node).block != info(readers[0]).block:
            continue
        if info(node).hooked:
            return True
        seen.add(node)
        stack += node.users if info(node).is_live or info(node).boundary else ()
    return False


def _undo_detach(node: fx.Node) -> None:
    """Remove the detach of a training-only branch: :func:`_cross` inserts one where the value really crosses."""
    for user in list(node.users):
        if info(user).boundary and info(user).training_only and user.target in (torch.detach, torch.clone):
            _undo_detach(user)
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _add(graph: fx.Graph, target: Target, args: tuple[Argument, ...], record: NodeInfo, block: int) -> fx.Node:
    """Add a node of a boundary at the graph's insertion point; `record` belongs to the value that it carries on."""
    node = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args)
    node.meta[INFO] = boundary_record(record, site=f"{record.site}@{operation(node)}{block}", block=block)
    return node
