"""Data flow: what must run before a node, writes included, and which block runs a node.

The edges of a graph do not show that a value was overwritten in between. Everything here therefore also follows the
storages that ``annotate`` recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx
from torch import fx

from sedona_fx.ir.graph import info, output_node


def dependency_graph(graph: fx.Graph) -> nx.DiGraph:
    """Return what must run before what: an edge from each node's inputs, and from the last earlier writes to them.

    Predecessors of a node are in the order of :func:`predecessors`.
    """
    needs = nx.DiGraph()
    needs.add_nodes_from(graph.nodes)
    for node, sources in predecessors(graph).items():
        needs.add_edges_from((source, node) for source in sources)
    return needs


def predecessors(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node, in the order of the program, its inputs and the last earlier writes to them, latest first.

    So where several will do, an algorithm that takes the first one takes the latest.
    """
    position = {node: k for k, node in enumerate(graph.nodes)}
    return {
        node: sorted(sources, key=position.__getitem__, reverse=True) for node, sources in needed_before(graph).items()
    }


def needed_before(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Return for each node, in the order of the program, its inputs and the last earlier writes to them."""
    last_writes: dict[int, fx.Node] = {}
    needed: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        read = {storage for source in node.all_input_nodes for storage in info(source).storages}
        needed[node] = {*node.all_input_nodes, *(last_writes[storage] for storage in read if storage in last_writes)}
        last_writes.update(dict.fromkeys(info(node).mutates, node))
    return needed


def readers_before_writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node that overwrites a value the nodes that read it before, and so may not move behind the write.

    Left out are branches of training outputs, for which :func:`~sedona_fx.passes.lower.lower` keeps a copy.
    """
    readers: dict[int, list[fx.Node]] = {}
    before: dict[fx.Node, list[fx.Node]] = {}
    shown = shown_late(graph)
    for node in graph.nodes:
        written = info(node).mutates
        earlier = [reader for storage in sorted(written) for reader in readers.get(storage, ())]
        if kept := [reader for reader in earlier if not info(reader).training_only or written & shown]:
            before[node] = kept
        read = info(node).storages.union(*(info(source).storages for source in node.all_input_nodes))
        for storage in read:
            readers.setdefault(storage, []).append(node)
    return before


def input_graph(graph: fx.Graph) -> nx.DiGraph:
    """Return the edges of a graph alone, from each node's inputs to the node."""
    edges = nx.DiGraph()
    edges.add_nodes_from(graph.nodes)
    edges.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return edges


def ancestors(root: fx.Node, needs: nx.DiGraph) -> set[fx.Node]:
    """Return the nodes that a node needs, itself included."""
    return {root, *nx.ancestors(needs, root)}


def longest_chain(
    graph: fx.Graph, candidates: Iterable[fx.Node], needs: Mapping[fx.Node, Sequence[fx.Node]] | None = None
) -> list[fx.Node]:
    """Return the longest sequence of candidates in which each needs all earlier ones, in the order of the program.

    It lies on the path through the dependencies that meets most candidates. Of chains of one length the one that keeps
    to the latest nodes is taken. It is asked for many times a graph, so it is counted here, and not by networkx.

    Args:
        graph: annotated.
        candidates: nodes of it.
        needs: its :func:`predecessors`, where these are at hand.
    """
    wanted = set(candidates)
    needs = predecessors(graph) if needs is None else needs
    lengths: dict[fx.Node, int] = {}
    before: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        source = max(needs[node], key=lengths.__getitem__, default=None)
        lengths[node] = (node in wanted) + (lengths[source] if source is not None else 0)
        before[node] = source
    chain, at = list[fx.Node](), max(lengths, key=lengths.__getitem__, default=None)
    while at is not None:
        chain += [at] if at in wanted else []
        at = before[at]
    return chain[::-1]


def block_of(graph: fx.Graph, ends: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Return the block that runs each node: the first block whose end needs it, or the last block if no end does.

    A value that only a later block consumes is therefore computed in that block, and no parameter is left without a
    gradient. The exceptions are:

    - A value without a gradient that is computed from an activation (a mask, a shape) stays in the block of what it is
      computed from. It crosses the boundary in place of the activation.
    - A node that nothing needs (an assertion, a write that nobody reads) stays in the block of what it reads.
    - No node moves past a later write to what it reads, except in branches of training outputs, for which
      :func:`~sedona_fx.passes.lower.lower` keeps a copy.
    - What heads are given of the output is computed in the first block.
    - A tuple is unpacked in the block that computes it, so that only tensors cross.

    Args:
        graph: an annotated graph, in the order of the program.
        ends: the nodes that end the blocks, in order, without that of the last block.
    """
    needs = dependency_graph(graph)
    blocks: dict[fx.Node, int] = {}
    if ends:  # every head reads these
        _claim([node for node in graph.nodes if info(node).given], 0, needs, blocks)
    for block, end in enumerate(ends):
        _claim([end], block, needs, blocks)
    needed = ancestors(output_node(graph), needs)
    readers = readers_before_writes(graph)
    for node in graph.nodes:
        if node not in blocks and (node in needed or node.op == "output"):
            blocks[node] = len(ends)
        if node in blocks and _crosses_for_free(node):
            # A mask or a shape crosses in place of the activation that it is computed from.
            sources = [source for source in needs.pred[node] if not _is_given(source)]
            blocks[node] = min(blocks[node], max((blocks[source] for source in sources), default=0))
        elif node in blocks and is_unpacking(node):
            blocks[node] = blocks[node.all_input_nodes[0]]
        elif node not in blocks:
            sources = [source for source in (*needs.pred[node], *readers.get(node, ())) if not _is_given(source)]
            blocks[node] = max((blocks[source] for source in sources), default=_block_of_code_around(node, blocks))
    reads_before_writes = [(reader, write) for write, before in readers.items() for reader in before]
    while too_late := [(reader, write) for reader, write in reads_before_writes if blocks[reader] > blocks[write]]:
        for reader, write in too_late:
            _claim([reader], blocks[write], needs, blocks)
    for node in graph.nodes:
        if node.op == "get_attr":  # any block may read the model's tensors; recorded is the first block that does
            blocks[node] = min((blocks[user] for user in node.users), default=0)
    return blocks


def shown_late(graph: fx.Graph) -> set[int]:
    """Return the storages that are overwritten after a view for training outputs is made and before it is read.

    Such a view shows the write, so it cannot be replaced by a copy from before the write.
    """
    position = {node: k for k, node in enumerate(graph.nodes)}
    views: dict[int, list[fx.Node]] = {}
    shown: set[int] = set()
    for node in graph.nodes:
        for storage in info(node).mutates:
            if any(position[user] > position[node] for view in views.get(storage, ()) for user in view.users):
                shown.add(storage)
        if info(node).training_only:
            for storage in info(node).storages:
                views.setdefault(storage, []).append(node)
    return shown


def is_unpacking(node: fx.Node) -> bool:
    """Whether a node takes an element out of a tuple, a list or a dictionary that was computed."""
    return (
        node.target is operator.getitem
        and len(node.all_input_nodes) == 1
        and node.all_input_nodes[0].op != "placeholder"
        and not info(node.all_input_nodes[0]).is_tensor
    )


def _claim(roots: Sequence[fx.Node], block: int, needs: nx.DiGraph, blocks: dict[fx.Node, int]) -> None:
    """Put the roots and everything that they need into a block, apart from nodes of this or an earlier block."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        if blocks.get(node, block + 1) > block:
            blocks[node] = block
            stack.extend(needs.pred[node])


def _crosses_for_free(node: fx.Node) -> bool:
    """Whether a value without a gradient is computed from an activation: it can be computed as soon as that exists."""
    record = info(node)
    return (
        node.op not in ("placeholder", "output")
        and not (record.training_only or record.boundary or record.is_live)
        and any(info(source).is_live for source in node.all_input_nodes)
    )


def _is_given(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _block_of_code_around(node: fx.Node, blocks: Mapping[fx.Node, int]) -> int:
    """Return the block for a node that reads nothing but attributes of the model (a counter, for example).

    It is the block of the next node from the same module's code.
    """
    following = node.next
    while following.op != "output" and not (info(following).path == info(node).path and following in blocks):
        following = following.next
    return blocks.get(following, 0) if following.op != "output" else 0
