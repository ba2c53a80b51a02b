"""annotated -> ANALYSED: where a block may legally end.

A cut point is one float tensor that depends on parameters and is the only such tensor crossing from what lies before to
what lies behind it. Integers, shapes, masks and floats without parameters in them cross for free. Branches that feed
only training outputs (GoogLeNet's classifiers) move to the last block and do not count.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.graph import NodeInfo, Phase, ancestors, info, output_node
from sedona_fx.outputs import Key, fields, find_primary
from sedona_fx.passes.alias import opaque_writes
from sedona_fx.passes.base import graph_pass

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
    behind = ancestors([primary])
    for node in ancestors([output_node(gm.graph)]) - behind:
        info(node).training_only = node.op not in ("placeholder", "output")
    positions = _single_live(gm.graph, behind, primary)
    for node in gm.graph.nodes:
        info(node).cut, info(node).base_layer = None, False
    taken: dict[str, fx.Node] = {}
    for node in positions:
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


def _schedule(graph: fx.Graph, behind: set[fx.Node]) -> list[fx.Node]:
    """Order nodes as the program does, but put what needs no input right before its first reader."""
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [a for a in top.all_input_nodes if a not in placed and not info(a).from_input]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in placed:
                placed.add(top)
                order.append(top)

    for node in graph.nodes:
        if node in behind and info(node).from_input:
            place(node)
    return order


def _single_live(graph: fx.Graph, behind: set[fx.Node], primary: fx.Node) -> list[fx.Node]:
    """Return the nodes that are the only live value right behind themselves or, later, behind some other node."""
    order = _schedule(graph, behind)
    index = {node: k for k, node in enumerate(order)}
    last_use = {node: max((index[u] for u in node.users if u in index), default=-1) for node in order}
    blocked = _blocked(graph, order, index)
    ending: dict[int, list[fx.Node]] = {}
    live: dict[fx.Node, None] = {}
    found: dict[fx.Node, None] = {}
    for position, node in enumerate(order):
        for ended in ending.pop(position, ()):
            live.pop(ended, None)
        if info(node).is_live and last_use[node] > position:
            live[node] = None
            ending.setdefault(last_use[node], []).append(node)
        if len(live) == 1 and not blocked[position]:
            (only,) = live
            record = info(only)
            if only is not primary and record.is_tensor and record.from_input and not _output_is_view(only, primary):
                found[only] = None
    return list(found)


def _output_is_view(node: fx.Node, primary: fx.Node) -> bool:
    """Whether nothing but views lies between a node and the output: a block behind it would have nothing to do."""
    return bool(info(node).storages & info(primary).storages)


def _blocked(graph: fx.Graph, order: list[fx.Node], index: dict[fx.Node, int]) -> list[bool]:
    """Mark positions inside the life of an opaquely written storage, or between two users of one parameter."""
    spans: list[tuple[int, int]] = []
    nodes = list(graph.nodes)
    for first, last in opaque_writes(graph):
        inside = [index[n] for n in nodes[first : last + 1] if n in index]
        if inside:
            spans.append((min(inside), max(inside)))
    users: dict[str, list[int]] = {}
    for node in order:
        for name in _state_of(node):
            readers = [index[u] for u in node.users if u in index] if node.op == "get_attr" else [index[node]]
            users.setdefault(name, []).extend(readers)
    spans.extend((min(at), max(at)) for at in users.values() if at)
    depth = [0] * (len(order) + 1)
    for first, last in spans:
        depth[first] += 1
        depth[last] -= 1
    total, blocked = 0, []
    for change in depth[:-1]:
        total += change
        blocked.append(total > 0)
    return blocked


def _state_of(node: fx.Node) -> Collection[str]:
    """Return the names of the state a node reads; a module called twice shares its buffers as well."""
    if node.op == "get_attr":
        return (str(node.target),)
    return info(node).parameters


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
