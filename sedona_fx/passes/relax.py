"""ANALYSED -> RELAXED: put a split point with candidate heads at each chosen cut point.

SEDONA learns by gradient descent where to cut, so a cut must be able to be partly made. A split point
(:class:`~sedona_fx.ir.split_point.SplitPoint`) is such a cut: it passes the activation on unchanged, scales the
gradient that comes back, and gives the activation to its heads for a local loss. Cuts that need no search go through
this pass too, with one head each (:func:`~sedona_fx.passes.lower_at`), so that there is only one way from a decision to
blocks.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.ir.flow import block_of, is_unpacking, shown_late
from sedona_fx.ir.graph import INFO, SPLIT_POINTS, NodeInfo, copy_graph, cut_points, info, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint

LOCAL_OUTPUT = 1
"""Index of the local output among the results of a split point, ``(h, local output, *others)``."""


@graph_pass(Phase.RELAXED)
def relax(gm: fx.GraphModule, heads: Mapping[str, Sequence[nn.Module]]) -> fx.GraphModule:
    """Insert split points.

    Before: ANALYSED. After: RELAXED, that is

    - after each named cut point ``h`` stands ``h, local, *others = split_point(h, *others)``, where ``others`` are the
      other live values that cross there. All later readers take the results;
    - the graph returns ``(local, ..., output)``;
    - if a later node overwrites a result in place, later readers take a clone of it: the heads' backward reads ``h``;
    - branches that feed only training outputs read detached values (clones, if these are overwritten later).

    Args:
        gm: it is not changed. Modules are shared.
        heads: cut name -> candidate heads. An empty sequence makes a split point without heads, and without a local
            output.
    """
    graph, _ = copy_graph(gm.graph)
    gm = Program(gm, graph, class_name=type(gm).__name__)
    chosen = [node for node in cut_points(graph) if info(node).cut in heads]
    _detach_training_only(graph)
    _unpack_at_once(graph)
    blocks = block_of(graph, chosen)
    position = {node: k for k, node in enumerate(graph.nodes)}
    gates: dict[fx.Node, fx.Node] = {}  # live value -> what stands for it after the split points so far
    local_outputs: list[fx.Node] = []
    for index, end in enumerate(chosen):
        name, record = f"{SPLIT_POINTS}.{index}", info(end)
        candidates = heads[str(record.cut)]
        gm.add_submodule(name, SplitPoint(candidates))
        later = {n for n, k in position.items() if k > position[end] and not info(n).training_only}
        crossing = {end: [n for n in end.users if n in later and not (n.op == "output" and n.args[0] is end)]}
        # Nodes after the end that still belong to its block are dead code, so only values before it cross.
        for value in (n for n in position if n in blocks and blocks[n] <= index and position[n] < position[end]):
            if info(value).is_live and value.op != "get_attr":
                readers = [n for n in gates.get(value, value).users if n in later and blocks[n] > index]
                crossing |= {value: readers} if readers else {}
        with graph.inserting_after(end):
            split = graph.call_module(name, tuple(gates.get(value, value) for value in crossing))
        split.meta[INFO] = boundary_record(record, from_input=True)
        if candidates:
            with graph.inserting_after(split):
                local_outputs.append(graph.call_function(operator.getitem, (split, LOCAL_OUTPUT)))
            local_outputs[-1].meta[INFO] = boundary_record(record, from_input=True)
        for k, (value, readers) in enumerate(crossing.items()):
            overwritten = any(info(n).mutates & info(value).storages for n in later)
            place = 0 if value is end else k + LOCAL_OUTPUT
            gate = _add_gate(split, place, info(value), overwritten=overwritten)
            for reader in readers:
                reader.replace_input_with(gates.get(value, value), gate)
            gates[value] = gate
    result = output_node(graph)
    result.args = ((*local_outputs, result.args[0]),)
    gm.recompile()
    return gm


def boundary_record(record: NodeInfo, **changes: Any) -> NodeInfo:
    """Return the record of a node that a pass adds at a boundary to carry a value on.

    Args:
        record: of the node that computes the value.
        changes: fields of the new record that differ.
    """
    carried = NodeInfo(
        path=record.path,
        site=record.site,
        order=record.order,
        value=record.value,
        depends=record.depends,
        channel_dim=record.channel_dim,
        boundary=True,
    )
    return dataclasses.replace(carried, **changes)


def _add_gate(split: fx.Node, place: int, record: NodeInfo, *, overwritten: bool) -> fx.Node:
    """Add the node that stands for a value after a split point: the result at `place`, or a clone of it."""
    graph = split.graph
    with graph.inserting_after(split):
        gate = graph.call_function(operator.getitem, (split, place))
    gate.meta[INFO] = boundary_record(record, from_input=True)
    if overwritten:
        with graph.inserting_after(gate):
            gate = graph.call_function(torch.clone, (gate,))
        gate.meta[INFO] = boundary_record(record, from_input=True)
    return gate


def _unpack_at_once(graph: fx.Graph) -> None:
    """Move the nodes that unpack a tuple to directly after the node that computes it, before any later split point."""
    for node in list(graph.nodes):
        for user in reversed(list(node.users)):
            if is_unpacking(user):
                node.append(user)


def _detach_training_only(graph: fx.Graph) -> None:
    """Let branches that feed only training outputs read detached values: they belong to the last block."""
    late_views = shown_late(graph)
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in position:
        record = info(node)
        if record.training_only or node.op in ("output", "get_attr") or not (record.is_tensor and record.is_live):
            continue
        readers = [user for user in node.users if info(user).training_only and user.target is not torch.detach]
        readers.sort(key=position.__getitem__)
        if all(_only_builds_output(user) for user in readers):
            continue
        overwritten = any(info(n).mutates & record.storages and not info(n).training_only for n in _nodes_after(node))
        with graph.inserting_before(readers[0]):
            detached = graph.call_function(torch.detach, (node,))
            kept = graph.call_function(torch.clone, (detached,)) if overwritten else detached
        for new, name in ((detached, "detach"), (kept, "clone" if overwritten else "detach")):
            new.meta[INFO] = boundary_record(
                record,
                site=f"{record.site}@{name}",
                from_input=True,
                training_only=True,
                depends=False,  # no gradient leaves the branch
            )
        for user in readers:
            if not _only_builds_output(user):
                reads_late_view = info(user).storages & record.storages & late_views
                user.replace_input_with(node, detached if reads_late_view else kept)


def _nodes_after(node: fx.Node) -> list[fx.Node]:
    nodes = []
    following = node.next
    while following.op != "root":
        nodes.append(following)
        following = following.next
    return nodes


def _only_builds_output(node: fx.Node) -> bool:
    """Whether a node is the constructor of the model's output type, which takes the primary output as it is."""
    return all(user.op == "output" for user in node.users)
