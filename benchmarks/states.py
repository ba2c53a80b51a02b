"""The state of a module: fingerprints that show a change, copying it over, and taking the dropout out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from trees import call


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Return a digest of every tensor, of every module's type, mode and attributes, and of every gradient."""
    marks: dict[str, str] = {}
    for name, tensor in _tensors(module).items():
        marks[f"tensor {name}"] = f"{digest(tensor)} {tensor.requires_grad} {tensor.grad is None}"
    for path, child in module.named_modules():
        hooks = [name for name, value in vars(child).items() if "hook" in name and value]
        marks[f"module {path}"] = f"{type(child).__qualname__} {child.training} {sorted(vars(child))} {hooks}"
    return marks


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape, type and bits."""
    data = tensor.detach().cpu().contiguous().flatten()
    content = data.view(torch.uint8) if data.numel() else data
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.blake2b(content.numpy().data, digest_size=8).hexdigest()}"


@torch.no_grad()
def restore(module: nn.Module, source: nn.Module) -> None:
    """Give a module the numbers of another of the same structure, and no gradients."""
    ours, theirs = _tensors(module), _tensors(source)
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
        tensor.grad = None


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor that differs, or ''."""
    return next((name for name in before if not torch.equal(before[name], after[name])), "")


def settle(model: nn.Module, inputs: Any) -> None:
    """Take running statistics from one batch, so that in eval mode, too, the output depends on the input.

    Half as much variance again keeps untrained nets from magnifying rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(model.train(), inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var *= 1.5


def silence(model: nn.Module) -> None:
    """Set every probability of dropout to zero, stochastic depth and those in configurations included."""
    for module in model.modules():
        _without_dropout(module)
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            _without_dropout(config)


def _without_dropout(owner: Any) -> None:
    dropout = isinstance(owner, nn.modules.dropout._DropoutNd)
    for name, value in list(vars(owner).items()):
        if ("drop" in name.lower() or (dropout and name == "p")) and isinstance(value, float):
            setattr(owner, name, 0.0)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))
