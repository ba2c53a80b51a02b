"""Buffers that get their size in the first forward pass: observers of quantization keep them empty until then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PACKAGES = ("torch.ao.quantization.", "torchao.quantization.")
_OBSERVERS = frozenset({"FakeQuantizeBase", "ObserverBase", "AffineQuantizedObserverBase"})


def is_observer(module: nn.Module) -> bool:
    """Whether a module is a fake quantizer or another observer of PyTorch's quantization.

    The classes are known by name: importing them takes longer than everything else here.
    """
    return any(base.__name__ in _OBSERVERS and base.__module__.startswith(_PACKAGES) for base in type(module).__mro__)


def late_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return, by name, the buffers whose shape a forward pass may change."""
    found: dict[str, Tensor] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        own = {f"{path}.{name}" if path else name: t for name, t in inner._buffers.items() if t is not None}
        observes = is_observer(inner)
        found |= {name: t for name, t in own.items() if observes or not t.numel()}
    return found


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor in place; the tensor takes the shape of the value."""
    if tensor.shape != value.shape:
        tensor.resize_(value.shape)
    tensor.copy_(value)
