"""Make in-place data flow explicit: whoever reads a value after it was overwritten reads the overwriting node.

``F.relu_(x)`` or ``x[:, 0] = ...`` with a later reader of ``x`` hides an edge from the data flow. Everything after this
pass, the search for cuts above all, may then trust the edges. A write through a view (``x[:, 0].zero_()``) has no such
form and stays as it is; :func:`opaque_writes` names it: no cut is placed on or inside the life of what it writes to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sedona_fx.ir.graph import info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def explicit_writes(gm: fx.GraphModule) -> fx.GraphModule:
    """Redirect readers of an overwritten value to the node that overwrote it. Only edges change.

    Before: a TRACED graph with annotated storages. After: the same numbers; a value that a node overwrites whole and
    returns has no reader behind that node.
    """
    position = {node: k for k, node in enumerate(gm.graph.nodes)}
    changed = False
    overwritten: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if _overwrites_whole(node, source):
                for user in list(source.users):
                    if position[user] > position[node]:
                        user.replace_input_with(source, node)
                        changed = True
                overwritten[node] = source
                value: fx.Node | None = source
                while value is not None:  # all the values that this memory has held
                    _hand_over_names(value, node)
                    value = overwritten.get(value)
    if changed:
        gm.recompile()
    return gm


@dataclass(frozen=True)
class OpaqueWrite:
    """A write that the edges do not show: positions of the storage's first holder and of the write."""

    storage: int
    first: int
    last: int


def opaque_writes(graph: fx.Graph) -> list[OpaqueWrite]:
    """Return the writes that have no explicit form, with the life of what they write to."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    holders: dict[int, list[fx.Node]] = {}
    found = []
    for node in graph.nodes:
        for storage in sorted(info(node).mutates):
            before = holders.get(storage, [])
            explicit = any(_overwrites_whole(node, s) for s in node.all_input_nodes)
            # A view made before the write and read after it sees the new numbers through no edge.
            seen_through_view = any(position[user] > position[node] for other in before for user in other.users)
            if not explicit or seen_through_view:
                found.append(OpaqueWrite(storage, position[before[0]] if before else position[node], position[node]))
        for storage in info(node).storages:
            holders.setdefault(storage, []).append(node)
    return found


def _hand_over_names(source: fx.Node, node: fx.Node) -> None:
    """Let a module that overwrites a value and returns it have returned the node that overwrote it."""
    inside = f"{info(node).path}."
    names = tuple(name for name in info(source).returned_by if inside.startswith(f"{name.partition('#')[0]}."))
    info(node).returned_by = (*names, *(name for name in info(node).returned_by if name not in names))
    info(source).returned_by = tuple(name for name in info(source).returned_by if name not in names)


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
