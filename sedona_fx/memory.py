"""Peak activation bytes, counted by following storages: on CPU too, the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """Count the bytes of storages made inside the context that are alive at the same time.

    Activations, gradients on their way and work space that PyTorch's operators return are counted; what existed before
    (parameters, their gradients, inputs) is not. ``peak`` and ``current`` are in bytes. Work space inside one operator
    is not seen.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.current = 0
        self._known = {t.untyped_storage()._cdata for t in ignore}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # an input not seen before existed before
                self._follow(tensor, count=False)
        result = func(*args, **kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor, count=True)
        return result

    def _follow(self, tensor: Tensor, *, count: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if count else 0
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def peak_bytes(function: Any, *args: Any, **kwargs: Any) -> int:
    """Return the peak activation bytes of one call of `function`."""
    with PeakBytes() as meter:
        result = function(*args, **kwargs)
        del result
    return meter.peak


def device_peak_bytes(device: torch.device) -> int | None:
    """Return the allocator's own peak on an accelerator, or None on a device that has no such counter."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return None
