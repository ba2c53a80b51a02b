"""Calls of ``torch.autograd.grad`` in a forward: one node each, which finds its graph in whatever block it runs.

The node differentiates what ran before it, and so it needs three things that hold in the model, and not in a block:
gradients are on although the caller has turned them off (an evaluation runs under ``no_grad``); the tensor that is
differentiated by requires a gradient although it has entered the block detached; and what is differentiated was
computed from that very tensor. :func:`make_derivatives_local` sees to all three. That no boundary stands in between is
left to :mod:`sedona_fx.passes.crossings`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from sedona_fx.capture.graph_module import with_record
from sedona_fx.capture.whole.grad_calls import grad_calls, nodes_of, stretch
from sedona_fx.capture.whole.reasons import BACKWARD, GRAD
from sedona_fx.ir.flow import input_graph
from sedona_fx.ir.graph import INFO, NodeInfo, info
from sedona_fx.ir.region import Region


def with_gradient(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can differentiate by: the tensor itself, or the same numbers as a new leaf."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def make_derivatives_local(graph: fx.Graph) -> None:
    """Let every call of ``torch.autograd.grad`` work in a block of its own, whatever grad mode the caller has.

    Args:
        graph: as recorded; changed in place.
    """
    if not (calls := grad_calls(graph)):
        return
    _follow_requires_grad(graph)
    for call in calls:
        inside = stretch(call, input_graph(graph))
        for source in nodes_of(call, "inputs"):
            if source.op != "get_attr":
                readers = [node for node in source.users if node in inside]
                last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
                with graph.inserting_after(last[0] if source.op == "placeholder" else source):
                    leaf = graph.call_function(with_gradient, (source,))
                    with_record(leaf, info(source).path, region=info(source).region)
                for reader in readers:
                    reader.replace_input_with(source, leaf)
    needs = input_graph(graph)
    for node in set().union(*(stretch(call, needs) for call in calls)):
        region = info(node).region or Region()
        if region.grad is None:
            info(node).region = replace(region, grad=True)


def let_modules_derive(gm: fx.GraphModule) -> None:
    """Let modules that take derivatives by autograd read tensors that require a gradient, whatever block they are in.

    A module that is kept whole may call ``torch.autograd.grad`` with a tensor that it was given. So between it and each
    live tensor that it reads stands a node, and the module runs with gradients on.

    Args:
        gm: annotated; changed in place. It computes the same numbers.
    """
    modules = [node for node in gm.graph.nodes if info(node).derives == "autograd"]
    for node in modules:
        record = info(node)
        region = record.region or Region()
        record.region = region if region.grad is not None else replace(region, grad=True)
        for number, source in enumerate(node.all_input_nodes):
            if info(source).is_live and info(source).is_tensor and source.target is not with_gradient:
                with gm.graph.inserting_before(node):
                    leaf = gm.graph.call_function(with_gradient, (source,))
                given = info(source)
                leaf.meta[INFO] = NodeInfo(
                    path=record.path,
                    site=f"{record.site}@with_gradient{number}",
                    order=record.order,
                    region=record.region,
                    value=given.value,
                    depends=given.depends,
                    from_input=given.from_input,
                    storages=given.storages,
                    channel_dim=given.channel_dim,
                )
                node.replace_input_with(source, leaf)
    if modules:
        gm.recompile()


def _follow_requires_grad(graph: fx.Graph) -> None:
    """Let what reads a tensor after ``requires_grad_`` read the result of that, which is the same tensor."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "requires_grad_" and isinstance(node.args[0], fx.Node):
            for user in list(node.args[0].users):
                if position[user] > position[node]:
                    user.replace_input_with(node.args[0], node)


class DerivativeWatch(TorchFunctionMode):
    """Sees the derivatives that code takes in the body of a ``with`` statement.

    Args:
        refuse: raise TypeError instead. ``torch.export`` records no derivative, and ``backward`` on tensors without
            numbers would leave such tensors in the ``.grad`` of the model's parameters.

    Attributes:
        seen: whether one was taken.
    """

    def __init__(self, *, refuse: bool = False) -> None:
        super().__init__()
        self.refuse, self.seen = refuse, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DERIVATIVES:
            if self.refuse:
                raise TypeError(GRAD if func is torch.autograd.grad else BACKWARD)
            self.seen = True
        return func(*args, **(kwargs or {}))


_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
