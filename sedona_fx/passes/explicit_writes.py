"""TRACED -> TRACED, annotated: in-place writes become edges of the graph, so that later passes can trust the edges.

After ``F.relu_(x)`` a reader of ``x`` sees the new numbers, but no edge leads from the write to the reader. A pass that
moves or cuts along edges would give it the old ones. This pass redirects such readers to the node that wrote.

A write through a view (``x[:, 0].zero_()``) has no such form and stays as it is. :func:`opaque_writes` finds these: no
block may end at what they write to, nor between the first node that holds that memory and the write.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sedona_fx.ir.graph import info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def explicit_writes(gm: fx.GraphModule) -> fx.GraphModule:
    """Redirect readers of an overwritten value to the node that overwrote it.

    Before: TRACED, annotated. After: the same, computing the same numbers; a value that a node overwrites as a whole
    and returns has no reader after that node.

    Args:
        gm: changed in place. Only edges change, and the names of modules that return an overwritten value.
    """
    position = {node: k for k, node in enumerate(gm.graph.nodes)}
    edges_changed = False
    overwritten_by: dict[fx.Node, fx.Node] = {}  # node that writes -> the value that it overwrites
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            if not _overwrites_whole(node, source):
                continue
            for user in list(source.users):
                if position[user] > position[node]:
                    user.replace_input_with(source, node)
                    edges_changed = True
            overwritten_by[node] = source
            earlier: fx.Node | None = source
            while earlier is not None:  # every value that this memory has held
                _hand_over_names(earlier, node)
                earlier = overwritten_by.get(earlier)
    if edges_changed:
        gm.recompile()
    return gm


def _overwrites_whole(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node writes to all of `source` and returns it."""
    written, read = info(node), info(source)
    return (
        bool(written.mutates & read.storages)
        and written.is_tensor
        and read.is_tensor
        and written.storages == read.storages
        and written.value == read.value
    )


def _hand_over_names(source: fx.Node, node: fx.Node) -> None:
    """Let `node` replace `source` as the output of the modules in which it runs: they return what it wrote."""
    inside = f"{info(node).path}."
    names = tuple(name for name in info(source).returned_by if inside.startswith(f"{name.partition('#')[0]}."))
    info(node).returned_by = (*names, *(name for name in info(node).returned_by if name not in names))
    info(source).returned_by = tuple(name for name in info(source).returned_by if name not in names)


@dataclass(frozen=True)
class OpaqueWrite:
    """A write to memory that the edges do not show.

    Attributes:
        storage: number of the storage.
        first: position in the graph of the first node that holds the storage.
        last: position of the write.
    """

    storage: int
    first: int
    last: int


def opaque_writes(graph: fx.Graph) -> list[OpaqueWrite]:
    """Return the writes that cannot be made explicit, in the order of the graph."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    holders: dict[int, list[fx.Node]] = {}  # storage -> nodes so far whose value lies on it
    opaque = []
    for node in graph.nodes:
        for storage in sorted(info(node).mutates):
            earlier = holders.get(storage, [])
            explicit = any(_overwrites_whole(node, source) for source in node.all_input_nodes)
            # A view made before the write and read after it sees the new numbers, and no edge tells.
            seen_through_view = any(position[user] > position[node] for holder in earlier for user in holder.users)
            if not explicit or seen_through_view:
                first = position[earlier[0]] if earlier else position[node]
                opaque.append(OpaqueWrite(storage, first, last=position[node]))
        for storage in info(node).storages:
            holders.setdefault(storage, []).append(node)
    return opaque
