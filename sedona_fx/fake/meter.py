"""Count FLOPs, and the bytes that autograd keeps, on fake, meta or real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _batch_norm_shapes(input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any) -> Any:
    """Return what batch norm returns, without numbers; ``NotImplemented`` where PyTorch should find it out itself.

    For tensors without numbers it goes through the whole formula, some twenty operators of Python's: most of the time
    that a convolutional net's analysis took.
    """
    plain = input.dtype in (torch.float32, torch.float64) and input.is_contiguous()
    if not plain or not _without_numbers(input) or not (training or input.device.type == "cpu"):
        return NotImplemented
    statistics = (input.new_empty(input.shape[1] if training else 0) for _ in range(2))
    return (torch.empty_like(input), *statistics)


def _relu_shapes(input: Tensor) -> Any:
    return torch.empty_like(input) if _without_numbers(input) and input.is_contiguous() else NotImplemented


def _addmm_shapes(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Any:
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0] and bias.shape == weight.shape[1:]
    if scales or not fits or not bias.dtype == x.dtype == weight.dtype or not _without_numbers(x):
        return NotImplemented
    return x.new_empty(x.shape[0], weight.shape[1])


def _same_tensor(tensor: Tensor, *_: Any, **__: Any) -> Any:
    """Fill a tensor with numbers that it does not have."""
    return tensor if _without_numbers(tensor) else NotImplemented


def _without_numbers(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


_RULES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm_shapes,
    torch.ops.aten.relu.default: _relu_shapes,
    torch.ops.aten.addmm.default: _addmm_shapes,
    torch.ops.aten.normal_.default: _same_tensor,
    torch.ops.aten.uniform_.default: _same_tensor,
}
"""What operators do to tensors without numbers, where PyTorch takes long to find out: the same in shorter ways."""


class Meter(TorchDispatchMode):
    """Counts FLOPs of every operator and writes down which storages autograd keeps, on fake or real tensors.

    ``saved`` maps the storages that were kept since it was last emptied to their bytes; storages in `ignore`
    (parameters, buffers) are left out. Enter :meth:`measuring`.
    """

    def __init__(self, ignore: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.flops = 0
        self.saved: dict[int, int] = {}
        self._ignore: set[int] = set()
        self._alive: list[torch.UntypedStorage] = []  # a storage's address names it only while it lives
        self.ignore(ignore)

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leave the storages of these tensors out from now on."""
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

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ignore:
            self.saved[storage._cdata] = storage.nbytes()
            self._alive.append(storage)
        # An operation that kept its own output with the graph (ReLU) would hold itself, weights and all, for ever.
        return tensor if tensor.grad_fn is None else tensor.detach()

    @contextmanager
    def measuring(self) -> Iterator[Meter]:
        """Measure what runs in the body."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t), self:
            yield self
