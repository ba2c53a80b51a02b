"""Whether a block draws random numbers: only then are generators forked around it, which costs as much as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules import activation, batchnorm, conv, instancenorm, linear, normalization, pooling

from sedona_fx.ir.graph import operation

_QUIET_FILES = {m.__name__ for m in (batchnorm, conv, instancenorm, linear, normalization, pooling, activation)}
_QUIET_FUNCTIONS = ("_operator", "builtins", "sedona_fx.capture.inplace")
_LOUD = (nn.MultiheadAttention, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_QUIET_TYPES = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.Flatten, nn.Unflatten, nn.Embedding),
    *(nn.Identity, nn.Upsample, nn.PixelShuffle, nn.CrossEntropyLoss, nn.MSELoss),
)


def may_draw(gm: fx.GraphModule) -> bool:
    """Whether running a graph may draw random numbers, at any setting of its modules; True where that is not known."""
    calls = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    called = {str(node.target) for node in calls if node.op == "call_module"}
    modules = {m for path in called for m in gm.get_submodule(path).modules()}
    return not (all(map(_is_quiet_module, modules)) and all(_is_quiet_call(n) for n in calls if n.op != "call_module"))


def _is_quiet_module(module: nn.Module) -> bool:
    kind = type(module)
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if hooked or issubclass(kind, _LOUD):
        return False
    if isinstance(module, fx.GraphModule):
        return not may_draw(module)
    return kind in _QUIET_TYPES or kind.__module__ in _QUIET_FILES or kind.__module__.startswith("sedona_fx.heads.")


def _is_quiet_call(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _is_quiet_operator(target.overloadpacket)
    if getattr(target, "__module__", "") in _QUIET_FUNCTIONS or target is getattr:
        return True
    name = operation(node)
    packet = getattr(torch.ops.aten, name.rstrip("_"), None) if name.isidentifier() else None
    plain = node.op == "call_method" or target in (getattr(torch, name, None), getattr(functional, name, None))
    return plain and isinstance(packet, torch._ops.OpOverloadPacket) and _is_quiet_operator(packet)


def _is_quiet_operator(packet: Any) -> bool:
    """Whether PyTorch has tagged no form of an operator as one that draws; pooling is handed what Python has drawn."""
    if packet.__name__.startswith("fractional_max_pool"):
        return False
    loud = torch.Tag.nondeterministic_seeded
    return not any(loud in getattr(packet, overload).tags for overload in packet.overloads())
