"""Peak activation bytes, counted by following storages: on CPU too, the same on every machine."""

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
    """Count the bytes of storages made inside the context that are alive at the same time.

    Activations, gradients on their way and work space that PyTorch's operators return are counted; what existed before
    (parameters, their gradients, inputs) is not. ``peak`` and ``current`` are in bytes. Work space inside one operator
    is not seen, nor are tensors that are not strided.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.current = 0
        self._sizes: dict[int, int | None] = {}  # by the storage's address, which names it while it lives
        for tensor in ignore:
            self._follow(tensor, count=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:  # an input not seen before existed before
            self._follow(tensor, count=False)
        result = func(*args, **kwargs)
        for tensor in [*given, *pytree.tree_leaves(result)]:  # an input may have been resized
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
        old = self._sizes[key]
        if old is not None:
            self._sizes[key] = storage.nbytes()
            self.current += storage.nbytes() - old
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key) or 0


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


def step_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each function, the runs interleaved so that drift hits all alike.

    Every other turn goes backwards: none always runs on what another one left in the caches.

    Wall time on the host: the functions must wait for their device themselves. Set the number of threads first.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in list(functions.items())[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
