"""Parametrized weights (weight norm, spectral norm, orthogonal) as the plain weights that they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from sedona_fx.ir.graph import INFO, info
from sedona_fx.ir.program import attribute, install

_NAME = "parametrizations"
"""Attribute under which PyTorch keeps the parametrizations of a layer."""


def bake_parametrizations(gm: fx.GraphModule) -> None:
    """Put the weights that parametrizations give into their place.

    ONNX does not have what some of them compute (a matrix exponential), and nobody trains a file.

    Args:
        gm: in eval mode; the caller's own copy, changed in place.
    """
    _bake_nodes(gm)
    for layer in gm.modules():
        if parametrize.is_parametrized(layer):
            _bake_layer(layer)


def _bake_layer(layer: nn.Module) -> None:
    """Give a layer the values of its parametrized tensors.

    Not by ``torch.nn.utils.parametrize.remove_parametrizations``: it takes the tensors off the layer's class, which the
    copy of a layer has in common with the original.
    """
    with torch.no_grad():
        values = {name: getattr(layer, name).detach().clone() for name in layer.get_submodule(_NAME)._modules}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer._modules[_NAME]
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=False))


def _bake_nodes(gm: fx.GraphModule) -> None:
    """Replace nodes that compute parametrized weights in the graph, of layers whose code is part of it."""
    values: dict[fx.Node, Any] = {}
    run = fx.Interpreter(gm)
    for node in gm.graph.nodes:
        path = str(node.target) if node.op == "call_module" else info(node).path
        inside = _NAME in path.split(".") and node.op not in ("placeholder", "output")
        if node.op == "get_attr":
            values[node] = attribute(gm, str(node.target))
        elif inside and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = getattr(run, node.op)(node.target, args, kwargs)
    computed = [node for node in values if node.op != "get_attr"]
    for index, node in enumerate(computed):
        if isinstance(values[node], Tensor) and any(user not in values for user in node.users):
            name = f"_parametrized_{index}"
            install(gm, name, values[node].detach().clone())
            with gm.graph.inserting_before(node):
                weight = gm.graph.get_attr(name)
            weight.meta[INFO] = info(node)
            node.replace_all_uses_with(weight)
    for node in reversed(list(values)):
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()
