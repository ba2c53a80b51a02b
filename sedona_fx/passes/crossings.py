"""annotated -> annotated: how many activations cross behind every place where a block could end.

A block that ends at a value holds what that value needs; everything else sinks behind it. What crosses is every float
activation that depends on parameters, was made in front of that place and is read behind it: one tensor in a plain net,
two inside a residual block, five at the bottom of a U-Net of depth four. Integers, shapes, masks and floats without
parameters in them cross for free. Branches that feed only training outputs (GoogLeNet's classifiers) move to the last
block and do not count.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from torch import fx
from torch.utils import _pytree as pytree

from sedona_fx.errors import OutputError
from sedona_fx.ir.flow import ancestors, dependencies
from sedona_fx.ir.graph import TensorSpec, info, operation, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.outputs import Key, fields, find_primary
from sedona_fx.ir.spec import Phase
from sedona_fx.passes.explicit_writes import opaque_writes

Needs = Mapping[fx.Node, Sequence[fx.Node]]


@graph_pass(Phase.TRACED)
def crossings(gm: fx.GraphModule, *, output: Key = None, whole: bool = False) -> fx.GraphModule:
    """Write into every node's record whether it serves training outputs only, and what crosses if a block ends there.

    Args:
        gm: an annotated graph with explicit writes. Only records change.
        output: the user's name for the primary output.
        whole: one node gives all that the graph returns, and the loss may be about any of it.
    """
    (result,) = output_node(gm.graph).args
    primary = result if whole and isinstance(result, fx.Node) else primary_node(gm.graph, output)
    needs = dependencies(gm.graph)
    behind = ancestors([primary], needs)
    needed = ancestors([output_node(gm.graph)], needs)
    for node in gm.graph.nodes:
        info(node).training_only = node in needed - behind and node.op not in ("placeholder", "output")
        info(node).crossing = 0
    for node, count in _count(gm.graph, behind, primary, needs).items():
        info(node).crossing = count
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


def read_token(graph: fx.Graph, output: Key = None) -> tuple[int | None, int]:
    """Return which one of the tokens (N, T, D) the primary output is made of, and T; (None, 0) if there is no such one.

    A class token is the first, a model that reads the last one has -1; a model that takes the mean reads them all.
    """
    try:
        todo = [primary_node(graph, output)]
    except OutputError:
        return None, 0
    seen, chosen = set[fx.Node](), set[tuple[int | None, int]]()
    while todo:
        node = todo.pop()
        if node in seen or not info(node).is_live or not info(node).from_input:
            continue
        seen.add(node)
        for source in node.all_input_nodes:
            value = info(source).value
            if isinstance(value, TensorSpec) and len(value.shape) == 3 and info(source).is_live:
                chosen.add((_selected(node, source), value.shape[1]))
            else:
                todo.append(source)
    found = chosen.pop() if len(chosen) == 1 else (None, 0)
    return found if found[0] is not None else (None, 0)


def _selected(node: fx.Node, source: fx.Node) -> int | None:
    """Return the token that a node takes out of (N, T, D): ``x[:, 0]``, or ``select(x, 1, 0)``."""
    if node.args[:1] != (source,):
        return None
    if node.target is operator.getitem:
        key = node.args[1]
        whole = slice(None)
        key = key[:-1] if isinstance(key, tuple) and len(key) == 3 and key[2] == whole else key
        if isinstance(key, tuple) and len(key) == 2 and key[0] == whole and isinstance(key[1], int):
            return key[1]
    if operation(node) == "select" and len(node.args) == 3 and node.args[1] == 1 and isinstance(node.args[2], int):
        return node.args[2]
    return None


def _constructor_arguments(node: fx.Node) -> dict[Key, fx.Node]:
    """Return field -> node if a node only builds the model's output type (a namedtuple, a dataclass) from values."""
    if node.op != "call_function" or not isinstance(node.target, type):
        return {}
    if node.target in (dict, OrderedDict, list) and len(node.args) == 1 and isinstance(node.args[0], list):
        items = node.args[0] if node.target is not list else enumerate(node.args[0])
        return {key: value for key, value in items if isinstance(value, fx.Node)}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in bound.arguments.items() if isinstance(value, fx.Node)}


def _count(graph: fx.Graph, behind: set[fx.Node], primary: fx.Node, needs: Needs) -> dict[fx.Node, int]:
    """Return the nodes behind which a block can end, with the number of activations that cross there.

    A node can end a block if it is one live tensor, the batch first, that is not just another view of the output, if
    what lies in front of it can be told from what lies behind it, and if no weight is left without a gradient: behind a
    ``detach`` the block's gradient does not reach the weights in front, and another output that trains them belongs to
    another block. Such weights have to be used again behind the node.

    Sets of nodes are bit sets: a net has thousands of nodes.
    """
    order = [node for node in graph.nodes if node in behind]
    bit = {node: 1 << k for k, node in enumerate(order)}
    readers = dict.fromkeys(order, 0)
    for node in order:
        for source in needs[node] if info(node).is_live else ():  # a mask takes no gradient from its source
            readers[source] |= bit[node]
    inseparable, trained = _inseparable(graph, bit), _trained(graph, bit, needs)
    weights = functools.reduce(operator.or_, trained, 0)
    written = {write.storage for write in opaque_writes(graph)}
    before: dict[fx.Node, int] = {}  # what a node needs, itself included
    reached: dict[fx.Node, int] = {}  # those of these that its gradient reaches
    crossing: dict[fx.Node, tuple[fx.Node, ...]] = {}  # the live values among these that others read
    found: dict[fx.Node, int] = {}
    for node in order:
        inside = bit[node]
        reached[node] = bit[node] if info(node).is_live else 0
        candidates: dict[fx.Node, None] = dict.fromkeys(part for part in _parts(node) if part in bit)
        for source in needs[node]:
            inside |= before[source]
            reached[node] |= reached[source] if info(node).is_live else 0
            candidates.update(dict.fromkeys(crossing[source]))
        before[node] = inside
        # What nobody outside of `inside` reads any more is read by nobody outside of a larger set either.
        crossing[node] = tuple(value for value in candidates if readers[value] & ~inside)
        record = info(node)
        # Nothing but views between a node and the output: a block behind it would have nothing to do.
        last = node is primary or bool(record.storages & info(primary).storages)
        if last or not (record.is_live and record.from_input and _is_batch(record.value, info(primary).value)):
            continue
        leaving = [node, *(value for value in crossing[node] if value is not node)]
        if any(not info(value).is_tensor or info(value).storages & written for value in leaving):
            continue
        missed = weights & inside & ~reached[node]
        if missed and any(uses & missed and not uses & ~inside for uses in trained):
            continue
        if all(group & inside in (0, group) for group in inseparable):
            found[node] = len({info(value).storages or value for value in leaving if info(value).from_input})
    return found


def _trained(graph: fx.Graph, bit: Mapping[fx.Node, int], needs: Needs) -> list[int]:
    """Return for every parameter the set of nodes that use it and that the gradient of some output reaches."""
    found, seen, todo = dict[str, int](), set[fx.Node](), list(output_node(graph).all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in seen and info(node).is_live:
            seen.add(node)
            for name in info(node).parameters:
                found[name] = found.get(name, 0) | bit.get(node, 0)
            todo.extend(needs[node])
    return list(found.values())


def _is_batch(value: object, primary: object) -> bool:
    """Whether a value is a tensor with one row of features an example, and not, say, all windows of all images."""
    if not isinstance(value, TensorSpec) or len(value.shape) < 2:
        return False
    return not isinstance(primary, TensorSpec) or not primary.shape or value.shape[0] == primary.shape[0]


def _parts(node: fx.Node) -> Iterable[fx.Node]:
    """Yield the live values that come into being with a node: itself, or the tensors that a tuple is taken apart into.

    A tuple is taken apart where it is made (see :func:`~sedona_fx.ir.flow.block_of`), so that only tensors cross.
    """
    if not info(node).is_live or node.op in ("placeholder", "get_attr"):
        return
    unpacking = [user for user in node.users if user.target is operator.getitem]
    if info(node).is_tensor or len(unpacking) < len(node.users):
        yield node
    else:
        for user in unpacking:
            yield from _parts(user)


def _inseparable(graph: fx.Graph, bit: Mapping[fx.Node, int]) -> list[int]:
    """Return sets of nodes that must stay in one block: users of what is written opaquely, and of a written buffer."""
    groups: dict[object, int] = {}
    nodes = list(graph.nodes)
    for write in opaque_writes(graph):
        for node in nodes[write.first : write.last + 1]:
            storages = set(info(node).storages).union(*(info(a).storages for a in node.all_input_nodes))
            if write.storage in storages:
                groups[write] = groups.get(write, 0) | bit.get(node, 0)
    written = {storage for node in nodes for storage in info(node).mutates}
    for attribute in nodes:
        if attribute.op == "get_attr" and info(attribute).storages & written:
            for node in nodes:
                if info(attribute).storages & (info(node).storages | info(node).mutates) or attribute in node.args:
                    key = str(attribute.target)
                    groups[key] = groups.get(key, 0) | bit.get(node, 0)
    return [group for group in groups.values() if group & (group - 1)]
