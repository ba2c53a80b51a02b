"""Make in-place data flow explicit: whoever reads a value after it was overwritten reads the overwriting node.

``F.relu_(x)`` with a later reader of ``x`` hides an edge from the data flow. Everything after this pass, the search for
cuts above all, may then trust the edges. Writes that have no such form (``x[:, 0] = ...``, a write through a view) stay
as they are; :func:`opaque_writes` names them, and no cut is placed inside the life of what they write to.
"""

from __future__ import annotations

from torch import fx

from sedona_fx.graph import Phase, info
from sedona_fx.passes.base import graph_pass


@graph_pass(Phase.TRACED)
def explicit_writes(gm: fx.GraphModule) -> fx.GraphModule:
    """Redirect readers of an overwritten value to the node that overwrote it. Only edges change.

    Before: a TRACED graph with annotated storages. After: the same numbers; a value that a node overwrites whole and
    returns has no reader behind that node.
    """
    position = {node: k for k, node in enumerate(gm.graph.nodes)}
    changed = False
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if _overwrites_whole(node, source):
                for user in list(source.users):
                    if position[user] > position[node]:
                        user.replace_input_with(source, node)
                        changed = True
    if changed:
        gm.recompile()
    return gm


def opaque_writes(graph: fx.Graph) -> list[tuple[int, int]]:
    """Return ``(first, last)`` positions: the life of a storage up to a write that has no explicit form."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    holders: dict[int, list[fx.Node]] = {}
    spans = []
    for node in graph.nodes:
        for storage in info(node).mutates:
            before = holders.get(storage, [])
            explicit = any(_overwrites_whole(node, s) for s in node.all_input_nodes)
            # A view made before the write and read after it sees the new numbers through no edge.
            seen_through_view = any(position[user] > position[node] for other in before for user in other.users)
            if not explicit or seen_through_view:
                spans.append((position[before[0]] if before else position[node], position[node]))
        for storage in info(node).storages:
            holders.setdefault(storage, []).append(node)
    return spans


def _overwrites_whole(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes into all of `source` and returns it."""
    written, read = info(node), info(source)
    return (
        bool(written.mutates & read.storages)
        and written.is_tensor
        and read.is_tensor
        and written.storages == read.storages
        and written.value == read.value
    )
