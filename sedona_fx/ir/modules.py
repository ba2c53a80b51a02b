"""Helpers on modules: copies that share tensors, training modes, devices, fast attribute access."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

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
            vars(module).update(module._modules)
    return gm


def share_copy(module: nn.Module) -> Any:
    """Return a copy of a module whose parameters and buffers are those of the original, the same objects."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of ``DataParallel``, ``DistributedDataParallel`` and what ``torch.compile`` returns.

    These run the model that they hold on devices, in processes or as compiled code, and change nothing of what it
    computes.
    """
    while (name := _INNER.get(type(model).__name__)) and type(model).__module__.startswith("torch."):
        model = getattr(model, name)
    return model


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
