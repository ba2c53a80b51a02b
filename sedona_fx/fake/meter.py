"""Count FLOPs, and the bytes that autograd keeps for the backward pass, on fake, meta or real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts the FLOPs of every operator and records which storages autograd keeps, on fake, meta or real tensors.

    Used as ``with meter.measuring(): ...``.

    Args:
        ignore: tensors whose storages are not recorded (parameters, buffers).

    Attributes:
        flops: floating-point operations so far, by PyTorch's formulas (two per multiply-add).
        saved: address -> bytes of the storages kept since the dictionary was last replaced.
    """

    def __init__(self, ignore: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.saved: dict[int, int] = {}
        self._ignore: set[int] = set()
        self._alive: list[torch.UntypedStorage] = []  # an address identifies a storage while it is alive
        self.ignore(ignore)

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not record the storages of these tensors from now on."""
        storages = [t.untyped_storage() for t in tensors]
        self._ignore.update(storage._cdata for storage in storages)
        self._alive.extend(storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = rule(*args, **(kwargs or {})) if rule is not None else NotImplemented
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor among those that autograd keeps; return what it may keep."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ignore:
            self.saved[storage._cdata] = storage.nbytes()
            self._alive.append(storage)
        # An operation that keeps its own output (ReLU) would form a cycle with the graph and never be freed, nor would
        # the weights that the graph refers to.
        return tensor if tensor.grad_fn is None else tensor.detach()

    @contextmanager
    def measuring(self) -> Iterator[Meter]:
        """Measure what runs in the body of the ``with`` statement."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t)
        with self._hooks, self:
            yield self

    @contextmanager
    def not_observing(self) -> Iterator[None]:
        """Do not see what autograd keeps in the body."""
        self._hooks.__exit__(None, None, None)
        try:
            yield
        finally:
            self._hooks.__enter__()


def _batch_norm_shapes(input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any) -> Any:
    """Return the outputs of batch norm without data, or ``NotImplemented`` to leave them to PyTorch.

    For tensors without data PyTorch runs the whole formula, some twenty operators in Python. That was most of the time
    that the analysis of a convolutional net took.
    """
    plain = input.dtype in (torch.float32, torch.float64) and input.is_contiguous()
    if not plain or not _without_data(input) or not (training or input.device.type == "cpu"):
        return NotImplemented
    statistics = (input.new_empty(input.shape[1] if training else 0) for _ in range(2))
    return (torch.empty_like(input), *statistics)


def _relu_shapes(input: Tensor) -> Any:
    return torch.empty_like(input) if _without_data(input) and input.is_contiguous() else NotImplemented


def _addmm_shapes(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Any:
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0] and bias.shape == weight.shape[1:]
    if scales or not fits or not bias.dtype == x.dtype == weight.dtype or not _without_data(x):
        return NotImplemented
    return x.new_empty(x.shape[0], weight.shape[1])


def _same_tensor(tensor: Tensor, *_: Any, **__: Any) -> Any:
    """Return the tensor itself: filling it in place does nothing if it has no data."""
    return tensor if _without_data(tensor) else NotImplemented


def _without_data(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


_RULES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm_shapes,
    torch.ops.aten.relu.default: _relu_shapes,
    torch.ops.aten.addmm.default: _addmm_shapes,
    torch.ops.aten.normal_.default: _same_tensor,
    torch.ops.aten.uniform_.default: _same_tensor,
}
"""Faster implementations, for tensors without data, of operators for which PyTorch's own take long."""
