"""Seconds of a step, and peak activation bytes, counted by following storages: on CPU too, equal on every machine."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """Count the bytes of the storages that are made inside the context and alive at the same time.

    Activations, intermediate gradients and work space that PyTorch's operators return are counted. Not counted are what
    existed before (parameters, their gradients, inputs), work space within one operator, and tensors that are not
    strided.

    Args:
        ignore: further tensors not to be counted.

    Attributes:
        peak: the largest number of bytes so far.
        current: the bytes that are alive now.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.current = 0
        # By the address of the storage, which identifies it while it is alive. None: not counted.
        self._sizes: dict[int, int | None] = {}
        for tensor in ignore:
            self._follow(tensor, count=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:  # an input that was not made inside the context existed before it
            self._follow(tensor, count=False)
        result = func(*args, **kwargs)
        for tensor in [*inputs, *pytree.tree_leaves(result)]:  # an input may have been resized
            if isinstance(tensor, Tensor):
                self._follow(tensor, count=True)
        return result

    def _follow(self, tensor: Tensor, *, count: bool) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if count else None
            weakref.finalize(storage, self._forget, key).atexit = False
        old_size = self._sizes[key]
        if old_size is not None:
            self._sizes[key] = storage.nbytes()
            self.current += storage.nbytes() - old_size
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key) or 0


def peak_bytes(function: Any, *args: Any, **kwargs: Any) -> int:
    """Return the peak activation bytes of one call ``function(*args, **kwargs)``, its result included."""
    with PeakBytes() as meter:
        result = function(*args, **kwargs)
        del result
    return meter.peak


def device_peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes by the device's own allocator, or None for a device without such a counter."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return None


def step_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each function.

    The runs are interleaved, so that drift affects all functions alike, and every other round is in reverse order, so
    that no function always runs on the caches that the same other one left.

    Args:
        functions: name -> function. It is the wall time on the host that is measured: a function has to wait for its
            device itself. Set the number of threads first.
        repeats: measured runs of each function.
        warmup: runs of each function before that are not measured.

    Returns:
        name -> median seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in list(functions.items())[:: 1 if round_number % 2 == 0 else -1]:
            start = time.perf_counter()
            function()
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
