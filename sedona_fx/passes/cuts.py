"""annotated -> ANALYSED: where a block may legally end.

A cut point is one float tensor that depends on parameters and is the only such tensor crossing from what it needs to
everything else. Integers, shapes, masks and floats without parameters in them cross for free. Branches that feed only
training outputs (GoogLeNet's classifiers) move to the last block and do not count; other branches that are not needed
yet (a position embedding, a second look at the input) sink into the block that reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.flow import ancestors, dependencies
from sedona_fx.graph import NodeInfo, Phase, info, output_node
from sedona_fx.outputs import Key, fields, find_primary
from sedona_fx.passes.alias import opaque_writes
from sedona_fx.passes.base import graph_pass

Needs = Mapping[fx.Node, Sequence[fx.Node]]
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
)
_FOLLOWER_WORDS = ("norm", "relu", "gelu", "silu", "swish", "sigmoid", "tanh", "mish", "elu", "pool", "dropout", "drop")


@graph_pass(Phase.ANALYSED)
def cuts(gm: fx.GraphModule, *, output: Key = None, keep: Collection[str] | None = None) -> fx.GraphModule:
    """Name every legal cut point in its node's record, and mark those that end a base layer.

    Args:
        gm: an annotated graph with explicit writes. Only records change.
        output: the user's name for the primary output.
        keep: names of cut points that are legal in the other mode's graph too; others are dropped.
    """
    primary = primary_node(gm.graph, output)
    needs = dependencies(gm.graph)
    behind = ancestors([primary], needs)
    needed = ancestors([output_node(gm.graph)], needs)
    for node in gm.graph.nodes:
        info(node).training_only = node in needed - behind and node.op not in ("placeholder", "output")
    for node in gm.graph.nodes:
        info(node).cut, info(node).base_layer = None, False
    taken: dict[str, fx.Node] = {}
    for node in _legal(gm.graph, behind, primary, needs):
        name = cut_name(info(node))
        if name not in taken and (keep is None or name in keep):
            taken[name] = node
            info(node).cut = name
    mark_base_layers(gm)
    return gm


def primary_node(graph: fx.Graph, output: Key = None) -> fx.Node:
    """Return the node of the primary output."""
    (result,) = output_node(graph).args
    if not isinstance(result, fx.Node):
        specs = pytree.tree_map(lambda n: info(n).value if isinstance(n, fx.Node) else n, result)
        return dict(fields(result))[find_primary(specs, output)]
    key = find_primary(info(result).value, output)
    made = _constructor_arguments(result)
    return made.get(key, result) if key is not None else result


def _constructor_arguments(node: fx.Node) -> dict[Key, fx.Node]:
    """Return field -> node if a node only builds the model's output type (a namedtuple, a dataclass) from values."""
    if node.op != "call_function" or not isinstance(node.target, type):
        return {}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in bound.arguments.items() if isinstance(value, fx.Node)}


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


def _legal(graph: fx.Graph, behind: set[fx.Node], primary: fx.Node, needs: Needs) -> list[fx.Node]:
    """Return the nodes with the property that nothing live leaves the set of what they need, except themselves.

    That set is what :func:`~sedona_fx.flow.block_of` puts before the cut; everything else sinks behind it. Sets of
    nodes are bit sets: a net has thousands of nodes.
    """
    order = [node for node in graph.nodes if node in behind]
    bit = {node: 1 << k for k, node in enumerate(order)}
    readers = dict.fromkeys(order, 0)
    for node in order:
        for source in needs[node] if info(node).is_live else ():  # a mask takes no gradient from its source
            readers[source] |= bit[node]
    inseparable = _inseparable(graph, bit, needs)
    written = {write.storage for write in opaque_writes(graph)}
    before: dict[fx.Node, int] = {}  # what a node needs, itself included
    read: dict[fx.Node, int] = {}  # who reads the live values among these, itself excluded
    found: list[fx.Node] = []
    for node in order:
        before[node], read[node] = bit[node], 0
        for source in needs[node]:
            before[node] |= before[source]
            # What depends on no input (a position embedding) sinks to its readers.
            crosses = info(source).is_live and info(source).from_input
            read[node] |= read[source] | (readers[source] if crosses else 0)
        record = info(node)
        # Nothing but views between a node and the output: a block behind it would have nothing to do.
        last = node is primary or bool(record.storages & info(primary).storages)
        if not (record.is_tensor and record.is_live and record.from_input) or last or record.storages & written:
            continue
        if not read[node] & ~before[node] and all(group & before[node] in (0, group) for group in inseparable):
            found.append(node)
    return _longest_chain(found, before, bit)


def _inseparable(graph: fx.Graph, bit: Mapping[fx.Node, int], needs: Needs) -> list[int]:
    """Return sets of nodes that must stay in one block: users of one parameter, and of what is written opaquely."""
    groups: dict[object, int] = {}
    nodes = list(graph.nodes)
    for write in opaque_writes(graph):
        for node in nodes[write.first : write.last + 1]:
            storages = set(info(node).storages).union(*(info(a).storages for a in node.all_input_nodes))
            if write.storage in storages:
                groups[write] = groups.get(write, 0) | bit.get(node, 0)
    written = {storage for node in nodes for storage in info(node).mutates}
    # What a value that depends on no input was made from, parameters above all, is used where that value is used.
    made_from: dict[fx.Node, set[str]] = {}
    for node in nodes:
        names = set(info(node).parameters)
        if node.op == "get_attr" and info(node).storages & written:
            names.add(str(node.target))  # a buffer that forward writes to
        names.update(*(made_from.get(source, ()) for source in needs[node]))
        if not info(node).from_input:
            made_from[node] = names
            continue
        for name in names:
            groups[name] = groups.get(name, 0) | bit.get(node, 0)
    return [group for group in groups.values() if group & (group - 1)]


def _longest_chain(nodes: list[fx.Node], before: Mapping[fx.Node, int], bit: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Return the longest series of cut points each of which needs all earlier ones: two towers are not cut both."""
    best: dict[fx.Node, tuple[int, fx.Node | None]] = {}
    for k, node in enumerate(nodes):
        best[node] = (1, None)
        for other in reversed(nodes[:k]):
            if before[node] & bit[other] and best[other][0] + 1 > best[node][0]:
                best[node] = (best[other][0] + 1, other)
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
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(word in name.lower() for word in _FOLLOWER_WORDS)
