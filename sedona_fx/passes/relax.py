"""ANALYSED -> RELAXED: put a split point with candidate heads at each chosen cut point."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from sedona_fx.ir.flow import block_of, is_unpacking, shown_late
from sedona_fx.ir.graph import SPLIT_POINTS, NodeInfo, copy_graph, cut_points, info, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint


@graph_pass(Phase.RELAXED)
def relax(gm: fx.GraphModule, heads: Mapping[str, Sequence[nn.Module]]) -> fx.GraphModule:
    """Insert split points.

    Before: an ANALYSED graph. After: RELAXED; behind each named cut point ``h`` stands
    ``h, local, *others = split_point(h, *others)`` with the other live values that cross there, all later readers take
    these, and the graph returns ``(local, ..., output)``. Where a later node overwrites one of them in place, the way
    forward is a clone: the heads read ``h`` in their backward. Branches that feed only training outputs read detached
    values (a copy, where these are overwritten later).

    Args:
        gm: the ANALYSED graph; it is not changed. Modules are shared.
        heads: cut name -> candidate heads (none: a split point without heads).
    """
    graph, _ = copy_graph(gm.graph)
    gm = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    chosen = [node for node in cut_points(graph) if info(node).cut in heads]
    _detach_training_only(graph)
    _unpack_at_once(graph)
    blocks = block_of(graph, chosen)
    position = {node: k for k, node in enumerate(graph.nodes)}
    gates: dict[fx.Node, fx.Node] = {}  # a live value -> what stands for it behind the split points so far
    locals_: list[fx.Node] = []
    for index, node in enumerate(chosen):
        name, record = f"{SPLIT_POINTS}.{index}", info(node)
        gm.add_submodule(name, SplitPoint(heads[str(record.cut)]))
        behind = {n for n, k in position.items() if k > position[node] and not info(n).training_only}
        crossing = {node: [n for n in node.users if n in behind and not (n.op == "output" and n.args[0] is node)]}
        # What stands behind the end and still belongs in front of it is dead code.
        for value in (v for v in position if v in blocks and blocks[v] <= index and position[v] < position[node]):
            if info(value).is_live and value.op != "get_attr":
                readers = [n for n in gates.get(value, value).users if n in behind and blocks[n] > index]
                crossing |= {value: readers} if readers else {}
        with graph.inserting_after(node):
            split = graph.call_module(name, tuple(gates.get(value, value) for value in crossing))
        split.meta["sedona"] = _boundary(record)
        with graph.inserting_after(split):
            if heads[str(record.cut)]:
                locals_.append(graph.call_function(operator.getitem, (split, 1)))
                locals_[-1].meta["sedona"] = _boundary(record)
        for k, (value, readers) in enumerate(crossing.items()):
            overwritten = any(info(n).mutates & info(value).storages for n in behind)
            gate = _gate(split, k + 1 if k else 0, info(value), overwritten=overwritten)
            for user in readers:
                user.replace_input_with(gates.get(value, value), gate)
            gates[value] = gate
    result = output_node(graph)
    result.args = ((*locals_, result.args[0]),)
    gm.recompile()
    return gm


def _boundary(record: NodeInfo) -> NodeInfo:
    """Return a record for a node of ours behind a node with `record`."""
    return NodeInfo(
        path=record.path,
        site=record.site,
        order=record.order,
        value=record.value,
        depends=True,
        from_input=True,
        channel_dim=record.channel_dim,
        boundary=True,
    )


def _gate(split: fx.Node, item: int, record: NodeInfo, *, overwritten: bool) -> fx.Node:
    """Return what stands for a value behind a split point: the split point's result, or a copy of it."""
    graph = split.graph
    with graph.inserting_after(split):
        gate = graph.call_function(operator.getitem, (split, item))
    gate.meta["sedona"] = _boundary(record)
    if overwritten:
        with graph.inserting_after(gate):
            gate = graph.call_function(torch.clone, (gate,))
        gate.meta["sedona"] = _boundary(record)
    return gate


def _unpack_at_once(graph: fx.Graph) -> None:
    """Move what takes tuples apart up to where they are made, so that it stands in front of every later split point."""
    for node in list(graph.nodes):
        for user in reversed(list(node.users)):
            if is_unpacking(user):
                node.append(user)


def _after(node: fx.Node) -> list[fx.Node]:
    nodes = []
    following = node.next
    while following.op != "root":
        nodes.append(following)
        following = following.next
    return nodes


def _detach_training_only(graph: fx.Graph) -> None:
    shown = shown_late(graph)
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in position:
        if info(node).training_only or node.op in ("output", "get_attr"):
            continue
        readers = [user for user in node.users if info(user).training_only and user.target is not torch.detach]
        readers.sort(key=position.__getitem__)
        if not readers or not info(node).is_tensor or not info(node).is_live:
            continue
        if all(_only_builds_output(user) for user in readers):
            continue
        overwritten = any(info(o).mutates & info(node).storages and not info(o).training_only for o in _after(node))
        with graph.inserting_before(readers[0]):
            detached = graph.call_function(torch.detach, (node,))
            kept = graph.call_function(torch.clone, (detached,)) if overwritten else detached
        for made, name in ((detached, "detach"), (kept, "clone" if overwritten else "detach")):
            made.meta["sedona"] = _boundary(info(node))
            info(made).site += f"@{name}"
            info(made).training_only, info(made).depends = True, False  # no gradient leaves through it
        for user in readers:
            if not _only_builds_output(user):
                user.replace_input_with(node, detached if info(user).storages & info(node).storages & shown else kept)


def _only_builds_output(node: fx.Node) -> bool:
    """Whether a node is the constructor of the model's output type: it reads the primary output as it is."""
    return all(user.op == "output" for user in node.users)
