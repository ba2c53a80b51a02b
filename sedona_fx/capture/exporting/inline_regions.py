"""Take the regions of an exported program apart: one flat list of nodes, each of which knows its region.

``torch.export`` keeps a region as one call of a sub-graph (``wrap_with_autocast``, ``wrap_with_set_grad_enabled``). No
block could end inside of it, under autocast it crashes, an error in it leaves gradients off, and of two regions inside
each other one may be missing. So every node is marked with its region while it is recorded, and the calls are inlined.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from sedona_fx.capture.hooks import replaced_here
from sedona_fx.capture.regions import RegionWatch
from sedona_fx.errors import TraceError
from sedona_fx.ir.region import Region

REGION = "sedona_region"
"""Key of the region of a node of the program in ``node.meta``."""


_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


@contextmanager
def mark_regions(watch: RegionWatch) -> Iterator[None]:
    """Write the region that is open into the ``meta`` of every call that is recorded in the body."""
    create = fx.Graph.create_node

    @functools.wraps(create)
    def marked(self: fx.Graph, op: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = create(self, op, *args, **kwargs)
        region = watch.current() if op == "call_function" else None
        if region is not None:
            node.meta[REGION] = region
        return node

    with replaced_here(fx.Graph, "create_node", marked):
        yield


def inline_regions(program: fx.GraphModule) -> None:
    """Put the nodes of all regions in the place of their calls.

    Args:
        program: its nodes are marked. Changed in place; the graph alone, so its code is out of date afterwards.

    Raises:
        TraceError: a node in a region has no mark of it.
    """
    while calls := [node for node in program.graph.nodes if node.target in (_AUTOCAST, _GRAD)]:
        for call in calls:
            _inline(program, call)
    program.graph.lint()


def _inline(program: fx.GraphModule, call: fx.Node) -> None:
    """Replace one call of a region by the nodes of its sub-graph."""
    first = 4 if call.target is _AUTOCAST else 1
    body, arguments = call.args[first], call.args[first + 1 :]
    assert isinstance(body, fx.Node)
    path = str(body.target)
    sub_graph = program.get_submodule(path).graph
    assert isinstance(sub_graph, fx.Graph)
    nodes = list(sub_graph.nodes)
    env: dict[fx.Node, Any] = dict(zip((n for n in nodes if n.op == "placeholder"), arguments, strict=True))
    results: Any = None
    for node in nodes:
        if node.op == "output":
            results = fx.map_arg(node.args[0], env.__getitem__)
        elif node.op != "placeholder":
            with program.graph.inserting_before(call):
                copy = env[node] = program.graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                copy.target = f"{path}.{node.target}"
            elif not _is_marked(call, node):
                raise TraceError(f"torch.export has lost that {node.name!r} runs inside {call.target}")
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        program.graph.erase_node(user)
    program.graph.erase_node(call)
    if not body.users:
        program.graph.erase_node(body)


def _is_marked(call: fx.Node, node: fx.Node) -> bool:
    """Whether a node of the sub-graph of `call` is marked with such a region, or calls a region itself."""
    region = node.meta.get(REGION, Region())
    if node.target in (_AUTOCAST, _GRAD, operator.getitem, torch.ops.aten._assert_tensor_metadata.default):
        return True  # made by torch.export itself
    if call.target is _GRAD:
        return (region.grad is not False) == call.args[0]
    return any(cast.device_type == call.args[0] for cast in region.casts)
