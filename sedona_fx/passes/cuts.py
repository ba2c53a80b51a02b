"""annotated -> ANALYSED: the legal cut points, by name, and those of them that end a base layer.

Of all places where a block could end (:mod:`sedona_fx.passes.crossings`), those are offered where at most ``max_live``
activations cross, which lie inside ``root`` and outside of what the user keeps whole, and which follow one another: of
two towers side by side, only one is cut. A cut that the user names is legal wherever a block can end.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from torch import fx, nn

from sedona_fx.ir.flow import ancestors, dependencies
from sedona_fx.ir.graph import NodeInfo, info, operation
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase

_FOLLOWERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.Identity,  # where one of the others was taken out
)
_FOLLOWER_WORDS = ("norm", "relu", "gelu", "silu", "swish", "sigmoid", "tanh", "mish", "elu", "pool", "dropout", "drop")


@graph_pass(Phase.ANALYSED)
def cuts(
    gm: fx.GraphModule,
    *,
    max_live: int = 1,
    keep: Collection[str] | None = None,
    also: Collection[str] = (),
    root: str = "",
    no_cut: Collection[str] = (),
) -> fx.GraphModule:
    """Name every legal cut point in its node's record, and mark those that end a base layer.

    Args:
        gm: a graph with crossings counted. Only records change.
        max_live: how many activations may cross at a cut point.
        keep: names of cut points that are legal in the other mode's graph too; others are dropped.
        also: names of cut points that are legal however many activations cross there, whatever lies around them.
        root: module path outside of which there is no cut; its own end counts as inside.
        no_cut: module paths inside of which there is none.
    """
    wanted = set(also)
    offered: dict[str, fx.Node] = {}
    for name, node in possible(gm.graph).items():
        named = not wanted.isdisjoint(aliases(info(node)))
        fits = (
            info(node).crossing <= max_live
            and is_inside(node, root)
            and not any(_strictly_inside(node, p) for p in no_cut)
        )
        if (fits or named) and (keep is None or name in keep):
            offered[name] = node
    chain = set(_longest_chain(gm.graph, [n for n in offered.values() if info(n).crossing <= max_live]))
    for node in gm.graph.nodes:
        info(node).cut, info(node).base_layer = None, False
    for name, node in offered.items():
        if node in chain or not wanted.isdisjoint(aliases(info(node))):
            info(node).cut = name
    mark_base_layers(gm)
    return gm


def possible(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the places where a block could end, by name, in the order of the program."""
    places: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if info(node).crossing:
            places.setdefault(cut_name(info(node)), node)
    return places


def cut_name(record: NodeInfo) -> str:
    """Name a cut in the user's module paths: the innermost module that ends there, else the operation's site."""
    return record.returned_by[0] if record.returned_by else record.site


def aliases(record: NodeInfo) -> Iterator[str]:
    """Yield every name by which a user may call a cut point."""
    yield from record.returned_by
    yield record.site


def resolve(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return every name of every legal cut point of an ANALYSED graph."""
    return {name: node for node in graph.nodes if info(node).cut is not None for name in aliases(info(node))}


def base_layers(gm: fx.GraphModule) -> list[str]:
    """Return the names of the cut points that end base layers, in order."""
    return [str(info(node).cut) for node in gm.graph.nodes if info(node).base_layer]


def follow_one_another(graph: fx.Graph, nodes: Sequence[fx.Node]) -> bool:
    """Whether each of the nodes needs the one before: blocks that end there follow one another."""
    needs = dependencies(graph)
    return all(first in ancestors([second], needs) for first, second in itertools.pairwise(nodes))


def start_of(graph: fx.Graph, path: str) -> fx.Node | None:
    """Return the place where a cut stands *before* a module: the latest activation that it reads and did not make."""
    inside = {node for node in graph.nodes if _within(info(node).path, path)}
    read = {source for node in inside for source in node.all_input_nodes} - inside
    return next((node for node in reversed(graph.nodes) if node in read and info(node).is_live), None)


def _within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _ends(node: fx.Node, module: str) -> bool:
    """Whether a node is what a module returns."""
    return module in (name.partition("#")[0] for name in info(node).returned_by) or str(node.target) == module


def is_inside(node: fx.Node, module: str) -> bool:
    """Whether a node is made inside a module, or is what the module returns."""
    return _within(info(node).path, module) or _ends(node, module)


def _strictly_inside(node: fx.Node, module: str) -> bool:
    return _within(info(node).path, module) and not _ends(node, module)


def _longest_chain(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the longest series of nodes each of which needs all earlier ones: two towers are not cut both."""
    needs = dependencies(graph)
    bit = {node: 1 << k for k, node in enumerate(nodes)}
    before: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before[node] = bit.get(node, 0)
        for source in needs[node]:
            before[node] |= before[source]
    best: dict[fx.Node, tuple[int, fx.Node | None]] = {}
    longest: list[int] = []  # of all chains that end at one of the first k + 1 nodes
    for k, node in enumerate(nodes):
        best[node] = (1, None)
        for other, bound in zip(reversed(nodes[:k]), reversed(longest), strict=True):
            if bound < best[node][0]:
                break
            if before[node] & bit[other] and best[other][0] + 1 > best[node][0]:
                best[node] = (best[other][0] + 1, other)
        longest.append(max(best[node][0], longest[-1] if longest else 0))
    chain: list[fx.Node] = []
    at = max(nodes, key=lambda n: best[n][0], default=None)
    while at is not None:
        chain.append(at)
        at = best[at][1]
    return chain[::-1]


def mark_base_layers(gm: fx.GraphModule) -> None:
    """Mark the cut points that end base layers: those the model declares, else those a rule keeps.

    The rule: the stretch since the last kept one holds a weight of two or more dimensions; the only reader is no norm,
    activation, pool or dropout (one reader among several, as in a pre-norm residual block, begins something new); and
    more than one weight is left behind it (a head there would only repeat the classifier that follows).
    """
    declared = gm.meta.get("base_layers")
    if declared:
        names = resolve(gm.graph)
        for path in declared[:-1]:  # the last base layer ends where the model does
            if path in names:
                info(names[path]).base_layer = True
        return
    weighty = [node for node in gm.graph.nodes if info(node).weighty and not info(node).training_only]
    left, since = len({n for w in weighty for n in info(w).parameters[:1]}), 0
    counted: set[str] = set()
    for node in gm.graph.nodes:
        record = info(node)
        if record.training_only:
            continue
        if record.weighty and record.parameters[0] not in counted:
            counted.add(record.parameters[0])
            since, left = since + 1, left - 1
        if record.cut is None:
            continue
        readers = [user for user in node.users if not info(user).training_only]
        if since and left > 1 and not (len(readers) == 1 and _follows(gm, readers[0])):
            record.base_layer, since = True, 0


def _follows(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node belongs to what stands before it: a norm, an activation, a pool or a dropout."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return (
            isinstance(module, _FOLLOWERS)
            or (type(module).__module__ == "torch.nn.modules.activation" and not any(True for _ in module.parameters()))
            or any(word in type(module).__name__.lower() for word in ("norm", "pool", "drop"))
        )
    return any(word in operation(node).lower() for word in _FOLLOWER_WORDS)
