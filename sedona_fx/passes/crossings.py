"""TRACED -> TRACED, annotated: where a block can end, and how many activations cross there.

Blocks are trained apart, so every activation that a later block reads must be handed on, detached. This pass counts
them, so that the next one (:mod:`sedona_fx.passes.cuts`) can offer the places where few cross.

A block that ends at a node holds what that node needs; everything else belongs to later blocks. What crosses there is
every float activation that depends on parameters, is computed by the block, and is read outside of it: one tensor in a
plain net, two inside a residual block, five at the bottom of a U-Net of depth four. Integers, shapes, masks and floats
that depend on no parameter cross for free. Branches that feed only training outputs (GoogLeNet's classifiers) move to
the last block and do not count.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import networkx as nx
from torch import fx
from torch.utils import _pytree as pytree

from sedona_fx.capture.whole.grad_calls import grad_calls, stretch
from sedona_fx.errors import OutputError
from sedona_fx.ir.flow import ancestors, dependency_graph, readers_before_writes
from sedona_fx.ir.graph import TensorSpec, info, operation, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.outputs import Key, Step, find_primary, pick
from sedona_fx.ir.spec import Phase
from sedona_fx.passes.explicit_writes import opaque_writes


@graph_pass(Phase.TRACED)
def crossings(gm: fx.GraphModule, *, output: Key = None, whole: bool = False) -> fx.GraphModule:
    """Fill in every node's `training_only` and `crossing`.

    Before: TRACED, annotated, with explicit writes. After: the same graph; every record says whether the node serves
    training outputs only, and how many activations cross if a block ends there (0: none can).

    Args:
        gm: only the records of its nodes change.
        output: the user's name for the primary output.
        whole: one node computes all that the graph returns, and the loss may be about any of it.
    """
    primary = loss_node(gm.graph, output, whole=whole)
    needs = dependency_graph(gm.graph)
    needed_by_primary = ancestors(primary, needs)
    needed_by_output = ancestors(output_node(gm.graph), needs)
    for node in gm.graph.nodes:
        for_training = node in needed_by_output - needed_by_primary
        info(node).training_only = for_training and node.op not in ("placeholder", "output")
        info(node).crossing = 0
    for node, count in _count(gm.graph, needed_by_primary, primary, needs).items():
        info(node).crossing = count
    return gm


def loss_node(graph: fx.Graph, output: Key = None, *, whole: bool = False) -> fx.Node:
    """Return the node that the loss is about: of the primary output, or the one that computes all (`whole`).

    Raises:
        OutputError: as :func:`primary_node`.
    """
    (result,) = output_node(graph).args
    return result if whole and isinstance(result, fx.Node) else primary_node(graph, output)


def primary_node(graph: fx.Graph, output: Key = None) -> fx.Node:
    """Return the node of the primary output.

    Args:
        graph: annotated.
        output: the user's name for the primary output; None: ``logits``, else the only or first float tensor.

    Raises:
        OutputError: there is no float tensor of that name, or none at all.
    """
    (result,) = output_node(graph).args
    if not isinstance(result, fx.Node):
        specs = pytree.tree_map(lambda n: info(n).value if isinstance(n, fx.Node) else n, result)
        primary: fx.Node = pick(result, find_primary(specs, output))
        return primary
    key = find_primary(info(result).value, output)
    for step in key if isinstance(key, tuple) else (key,):
        result = _constructor_arguments(result).get(step, result)
    return result


def read_token(graph: fx.Graph, output: Key = None) -> tuple[int | None, int]:
    """Return the index of the token that the primary output is computed from, and how many tokens there are.

    The index is 0 for a model with a class token first, and -1 for one that reads the last of its tokens (N, T, D), or
    (T, N, D) if that is known. A model that reads all of them (their mean, say), or has no tokens, gives ``(None, 0)``.
    """
    try:
        stack = [primary_node(graph, output)]
    except OutputError:
        return None, 0
    seen, tokens = set[fx.Node](), set[tuple[int | None, int]]()
    while stack:
        node = stack.pop()
        if node in seen or not info(node).is_live or not info(node).from_input:
            continue
        seen.add(node)
        for source in node.all_input_nodes:
            value = info(source).value
            if isinstance(value, TensorSpec) and len(value.shape) == 3 and info(source).is_live:
                dim = 0 if _steps_first(value, info(source).grown) else 1
                tokens.add((_selected_token(node, source, dim), value.shape[dim]))
            else:
                stack.append(source)
    token, count = tokens.pop() if len(tokens) == 1 else (None, 0)
    return (token, count) if token is not None else (None, 0)


def _steps_first(value: TensorSpec, grown: object) -> bool:
    """Whether a second size of the batch has shown that it is in dimension 1, and not in dimension 0."""
    return isinstance(grown, TensorSpec) and grown.shape[0] == value.shape[0] and grown.shape[1] != value.shape[1]


def _selected_token(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Return the token that a node takes out of tokens in a dimension: ``x[:, 0]``, or ``select(x, 1, 0)``."""
    if node.args[:1] != (source,):
        return None
    if node.target is operator.getitem:
        key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        place = key[dim] if len(key) > dim else None
        rest = [part for k, part in enumerate(key) if k != dim]
        if isinstance(place, int) and all(part == slice(None) for part in rest):
            return place
    if operation(node) == "select" and len(node.args) == 3 and node.args[1] == dim and isinstance(node.args[2], int):
        return node.args[2]
    return None


def _constructor_arguments(node: fx.Node) -> dict[Step, fx.Node]:
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


def _count(graph: fx.Graph, needed: set[fx.Node], primary: fx.Node, needs: nx.DiGraph) -> dict[fx.Node, int]:
    """Return the nodes at which a block can end, with the number of activations that cross there.

    A block can end at a node if

    - it is one live tensor, and not just another view of the output. Whether its rows are examples is asked by
      :mod:`sedona_fx.passes.batch`;
    - no write that the edges do not show connects what the block holds with the rest;
    - no weight is left without a gradient. After a ``detach`` the gradient of the block's loss does not reach the
      weights before it, and the other output that trains them belongs to another block. So such weights must be used
      again outside of the block.

    Sets of nodes are bit sets (integers), because a net has thousands of nodes.

    Args:
        graph: annotated.
        needed: the nodes that the primary output needs.
        primary: the primary output.
        needs: what must run before what.
    """
    order = [node for node in graph.nodes if node in needed]
    bit = {node: 1 << k for k, node in enumerate(order)}
    readers = dict.fromkeys(order, 0)
    for node in order:
        for source in needs.pred[node] if info(node).is_live else ():  # a mask takes no gradient from its source
            readers[source] |= bit[node]
    inseparable, weight_uses = _inseparable(graph, bit, needs), _weight_uses(graph, bit, needs)
    weighty = functools.reduce(operator.or_, weight_uses, 0)
    before_writes = readers_before_writes(graph)
    written_opaquely = {write.storage for write in opaque_writes(graph)}
    block: dict[fx.Node, int] = {}  # node -> what it needs, itself included: the block that would end at it
    reached: dict[fx.Node, int] = {}  # node -> those nodes of the block that its gradient reaches
    crossing: dict[fx.Node, tuple[fx.Node, ...]] = {}  # node -> live values of the block that others read
    counts: dict[fx.Node, int] = {}
    for node in order:
        inside = bit[node]
        reached[node] = bit[node] if info(node).is_live else 0
        candidates: dict[fx.Node, None] = dict.fromkeys(part for part in _live_parts(node) if part in bit)
        for source in needs.pred[node]:
            inside |= block[source]
            reached[node] |= reached[source] if info(node).is_live else 0
            candidates.update(dict.fromkeys(crossing[source]))
        for reader in before_writes.get(node, ()):  # they belong to the block that overwrites what they read
            inside |= block.get(reader, 0)
            candidates.update(dict.fromkeys(crossing.get(reader, ())))
        block[node] = inside
        # A value that nobody outside of a block reads is read by nobody outside of a larger block.
        crossing[node] = tuple(value for value in candidates if readers[value] & ~inside)
        record = info(node)
        # If only views lie between the node and the output, the next block would have nothing to do.
        is_output = node is primary or bool(record.storages & info(primary).storages)
        is_activation = record.is_live and record.from_input and record.is_tensor and not record.sealed
        if is_output or not is_activation:
            continue
        leaving = [node, *(value for value in crossing[node] if value is not node)]
        if any(not info(value).is_tensor or info(value).storages & written_opaquely for value in leaving):
            continue
        missed = weighty & inside & ~reached[node]
        if missed and any(uses & missed and not uses & ~inside for uses in weight_uses):
            continue
        if all(group & inside in (0, group) for group in inseparable):
            counts[node] = len({info(value).storages or value for value in leaving if info(value).from_input})
    return counts


def _weight_uses(graph: fx.Graph, bit: Mapping[fx.Node, int], needs: nx.DiGraph) -> list[int]:
    """Return for every parameter the set of nodes that use it and that the gradient of some output reaches."""
    uses, seen, stack = dict[str, int](), set[fx.Node](), list(output_node(graph).all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in seen and info(node).is_live:
            seen.add(node)
            for name in info(node).parameters:
                uses[name] = uses.get(name, 0) | bit.get(node, 0)
            stack.extend(needs.pred[node])
    return list(uses.values())


def _live_parts(node: fx.Node) -> Iterable[fx.Node]:
    """Yield the live values that a node computes: itself, or the tensors that its tuple is unpacked into.

    A tuple is unpacked by the block that computes it (see :func:`~sedona_fx.ir.flow.block_of`), so only tensors cross.
    """
    if not info(node).is_live or node.op in ("placeholder", "get_attr"):
        return
    unpacking = [user for user in node.users if user.target is operator.getitem]
    if info(node).is_tensor or len(unpacking) < len(node.users):
        yield node
    else:
        for user in unpacking:
            yield from _live_parts(user)


def _inseparable(graph: fx.Graph, bit: Mapping[fx.Node, int], needs: nx.DiGraph) -> list[int]:
    """Return sets of nodes that must stay in one block.

    These are the users of an opaquely written value, those of a written buffer, and what a call of
    ``torch.autograd.grad`` differentiates.
    """
    groups: dict[object, int] = {}
    nodes = list(graph.nodes)
    for call in grad_calls(graph):
        # One that the primary output does not need runs in the last block, like all other outputs.
        last = 0 if call in bit else 1 << len(bit)
        groups[call] = functools.reduce(operator.or_, (bit.get(node, 0) for node in stretch(call, needs)), last)
    for write in opaque_writes(graph):
        for node in nodes[write.first : write.last + 1]:
            storages = set(info(node).storages).union(*(info(source).storages for source in node.all_input_nodes))
            if write.storage in storages:
                groups[write] = groups.get(write, 0) | bit.get(node, 0)
    written = {storage for node in nodes for storage in info(node).mutates}
    for attribute in nodes:
        if attribute.op == "get_attr" and info(attribute).storages & written:
            name = str(attribute.target)
            for node in nodes:
                touched = info(node).storages | info(node).mutates
                if info(attribute).storages & touched or attribute in node.args:
                    groups[name] = groups.get(name, 0) | bit.get(node, 0)
    return [group for group in groups.values() if group & (group - 1)]  # of two nodes or more
