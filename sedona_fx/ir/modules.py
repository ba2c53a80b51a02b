"""Helpers on modules: copies that share tensors, training modes, devices, fast attribute access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.program import OWN

_INNER = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Classes of PyTorch that wrap a model -> the attribute that holds it."""


@contextmanager
def keep_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the ``training`` flag of every module of these on exit."""
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def direct_children(gm: fx.GraphModule) -> fx.GraphModule:
    """Let the generated code find submodules as plain attributes, and return `gm`.

    ``self.layer1.block.conv`` calls a ``__getattr__`` in Python per dot, which small nets notice (4 % of a MobileNet's
    forward pass). Children that are also in ``__dict__`` are found without it. They stay registered as before.
    """
    for module in gm.modules():
        if type(module) is torch.nn.Module or module is gm:  # containers made by fx, never a module of the user
            own = OWN if module is gm else ()
            vars(module).update({name: child for name, child in module._modules.items() if name not in own})
    return gm


def share_copy(module: nn.Module) -> Any:
    """Return a copy of a module whose parameters and buffers are those of the original, the same objects."""
    return deep_copy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


_LIBRARIES = ("torch", "torchvision", "sedona_fx", "_operator", "operator", "builtins", "math", "collections")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``DataParallel``, ``DistributedDataParallel`` and what ``torch.compile`` returns.

    These run the model that they hold on devices, in processes or as compiled code, and change nothing of what it
    computes.
    """
    while (name := _INNER.get(type(model).__name__)) and type(model).__module__.startswith("torch."):
        model = getattr(model, name)
    return model


def runs_python(graph: nn.Module) -> bool:
    """Whether a graph calls modules or functions of the user's own, which may draw from Python's generators."""
    if any(not type(inner).__module__.startswith(("torch.", "sedona_fx.")) for inner in graph.modules()):
        return True
    nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else ()
    return any(node.op == "call_function" and _is_users(node.target) for node in nodes)


def _is_users(function: Any) -> bool:
    """Whether a function is the user's own, or an object that stands for code of the user's (around a ``root=``)."""
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return f"{module}.".startswith("sedona_fx.capture.") or module.partition(".")[0] not in _LIBRARIES


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, or else of its first buffer; the CPU if it has neither."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def first_float_parameter(module: nn.Module) -> torch.Tensor | None:
    """Return the first parameter of a floating-point dtype, in the order of ``named_parameters``; None without one.

    It stands for the dtype and the device in which a module computes: integer parameters (quantised weights) and
    buffers (counters) do not. For a module with complex parameters alone, the real part of the first one does.
    """
    parameters = [parameter for _, parameter in module.named_parameters()]
    real = next((p for p in parameters if p.is_floating_point()), None)
    return real if real is not None else next((p.detach().real for p in parameters if p.is_complex()), None)


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module hold other parameters and buffers while the body runs.

    As ``torch.func.functional_call``, but recurrent layers, which keep a list of their weights besides, see them as
    well, and the tensors may have the names that fx keeps for itself.

    Args:
        module: of which the tensors are parameters and buffers.
        tensors: name -> tensor; a tied one under all its names.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    owners = dict(module.named_modules(remove_duplicate=False))
    recurrent = [layer for layer in owners.values() if isinstance(layer, nn.RNNBase)]
    try:
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            registry: dict[str, Any] = owners[path]._parameters
            registry = registry if last in registry else owners[path]._buffers
            before.append((registry, last, registry[last]))
            registry[last] = tensor
        _list_weights(recurrent)
        yield
    finally:
        for registry, last, tensor in reversed(before):
            registry[last] = tensor
        _list_weights(recurrent)


def _list_weights(layers: Iterable[nn.RNNBase]) -> None:
    """Let recurrent layers list the weights that they have now."""
    for layer in layers:
        vars(layer)["_flat_weights"] = [getattr(layer, name, None) for name in layer._flat_weights_names]


def like_of(module: nn.Module) -> Tensor:
    """Return the parameter of a net whose device and dtype new heads get; one without any has nothing to train."""
    parameter = first_float_parameter(module)
    assert parameter is not None
    return parameter
