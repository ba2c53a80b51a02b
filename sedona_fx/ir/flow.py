"""What must run before what, writes included, and which block runs a node.

The edges of a graph do not show that a value was overwritten in between. Everything here follows the storages that
``annotate`` found as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from sedona_fx.ir.graph import info, output_node


def dependencies(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return what must have run before every node: its inputs, and the last earlier writes to what it reads."""
    writers: dict[int, fx.Node] = {}
    needs: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        read = {storage for source in node.all_input_nodes for storage in info(source).storages}
        writes = [writers[storage] for storage in sorted(read) if storage in writers]
        needs[node] = list(dict.fromkeys((*node.all_input_nodes, *writes)))
        writers.update(dict.fromkeys(info(node).mutates, node))
    return needs


def ancestors(roots: Iterable[fx.Node], needs: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    """Return the nodes that the roots need, the roots included."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(needs[node])
    return seen


def block_of(graph: fx.Graph, ends: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return the block of every node: the first one whose end needs it; what no end needs belongs to the last block.

    So a value that only a later block consumes sinks into that block, and no parameter is left without a gradient. What
    carries no gradient (a mask, a shape) does not sink: it crosses instead of the activation that it is taken from.
    What nothing needs (assertions, writes that nobody reads) stays with what it reads. Nothing sinks past a write to
    what it reads, except branches of training outputs, for which :func:`~sedona_fx.passes.lower.lower` keeps a copy.
    A tuple is taken apart in the block that makes it, so that only tensors cross.

    Args:
        graph: in the order of the program.
        ends: the nodes that end the blocks, in order, without the last block's.
    """
    needs = dependencies(graph)
    blocks: dict[fx.Node, int] = {}
    for block, end in enumerate(ends):
        _claim([end], block, needs, blocks)
    needed = ancestors([output_node(graph)], needs)
    readers: dict[int, list[fx.Node]] = {}
    early: list[tuple[fx.Node, fx.Node]] = []
    shown = shown_late(graph)
    for node in graph.nodes:
        written = info(node).mutates
        early_readers = [reader for storage in sorted(written) for reader in readers.get(storage, ())]
        before = [r for r in early_readers if not info(r).training_only or written & shown]
        early.extend((reader, node) for reader in before)
        if node not in blocks and (node in needed or node.op == "output"):
            blocks[node] = len(ends)
        if node in blocks and _crosses_for_free(node):
            # A mask or a shape crosses in the place of the activation that it is taken from.
            blocks[node] = min(blocks[node], max((blocks[n] for n in needs[node] if not _is_given(n)), default=0))
        elif node in blocks and is_unpacking(node):
            blocks[node] = blocks[node.all_input_nodes[0]]
        elif node not in blocks:
            sources = [source for source in (*needs[node], *before) if not _is_given(source)]
            blocks[node] = max((blocks[source] for source in sources), default=_neighbour(node, blocks))
        read = info(node).storages.union(*(info(source).storages for source in node.all_input_nodes))
        for storage in read:
            readers.setdefault(storage, []).append(node)
    while late := [(r, w) for r, w in early if blocks[r] > blocks[w]]:
        for reader, write in late:
            _claim([reader], blocks[write], needs, blocks)
    for node in graph.nodes:
        if node.op == "get_attr":  # any block may read the model's tensors: here stands the first that does
            blocks[node] = min((blocks[user] for user in node.users), default=0)
    return blocks


def shown_late(graph: fx.Graph) -> set[int]:
    """Return the storages that are overwritten between the making and the reading of a view for training outputs.

    Such a view shows the write: it cannot read a copy from before.
    """
    position = {node: k for k, node in enumerate(graph.nodes)}
    views: dict[int, list[fx.Node]] = {}
    found: set[int] = set()
    for node in graph.nodes:
        for storage in info(node).mutates:
            late = (position[user] > position[node] for view in views.get(storage, ()) for user in view.users)
            if any(late):
                found.add(storage)
        if info(node).training_only:
            for storage in info(node).storages:
                views.setdefault(storage, []).append(node)
    return found


def _is_given(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _neighbour(node: fx.Node, blocks: Mapping[fx.Node, int]) -> int:
    """Return the block of the code around a node that reads nothing but the model's attributes (a counter, say)."""
    other = node.next
    while other.op != "output" and not (info(other).path == info(node).path and other in blocks):
        other = other.next
    return blocks.get(other, 0) if other.op != "output" else 0


def is_unpacking(node: fx.Node) -> bool:
    """Whether a node takes a value out of a tuple, a list or a dictionary that was computed."""
    return (
        node.target is operator.getitem
        and len(node.all_input_nodes) == 1
        and node.all_input_nodes[0].op != "placeholder"
        and not info(node.all_input_nodes[0]).is_tensor
    )


def _crosses_for_free(node: fx.Node) -> bool:
    """Whether a value of an activation holds no gradient: it may be computed as soon as the activation is there."""
    record = info(node)
    return (
        node.op not in ("placeholder", "output")
        and not (record.training_only or record.boundary or record.is_live)
        and any(info(source).is_live for source in node.all_input_nodes)
    )


def _claim(
    roots: Sequence[fx.Node], block: int, needs: Mapping[fx.Node, Sequence[fx.Node]], blocks: dict[fx.Node, int]
) -> None:
    """Put nodes and all they need into a block, unless an earlier one has them."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        if blocks.get(node, block + 1) > block:
            blocks[node] = block
            stack.extend(needs[node])
