"""Count FLOPs, and the bytes that autograd keeps for the backward pass, on fake, meta or real tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sedona_fx.fake.flops import formula_of, is_free, name_of


@dataclass
class Work:
    """What operators did.

    Attributes:
        flops: floating-point operations of those with a formula (:mod:`sedona_fx.fake.flops`), two a multiply-add.
        traffic: bytes that those read and wrote.
        uncounted: name of an operator that reads weights and has no formula -> bytes that it read and wrote.
    """

    flops: int = 0
    traffic: int = 0
    uncounted: dict[str, int] = field(default_factory=dict)

    def add(self, other: Work) -> None:
        """Add what other operators did."""
        self.flops += other.flops
        self.traffic += other.traffic
        for name, size in other.uncounted.items():
            self.uncounted[name] = self.uncounted.get(name, 0) + size

    @property
    def flops_a_byte(self) -> float:
        """FLOPs for each byte read and written by operators with a formula; 1 if there are none."""
        return self.flops / self.traffic if self.flops and self.traffic else 1.0

    def estimated(self, flops_a_byte: float) -> int:
        """Return the FLOPs, those of uncounted operators estimated from their bytes."""
        return self.flops + round(flops_a_byte * sum(self.uncounted.values()))


class Meter(TorchDispatchMode):
    """Counts the FLOPs of every operator and records which storages autograd keeps, on fake, meta or real tensors.

    Used as ``with meter.measuring(): ...``.

    Args:
        ignore: tensors whose storages are not recorded (parameters, buffers).

    Attributes:
        work: of the operators so far, since it was last replaced.
        saved: address -> bytes of the storages kept since the dictionary was last replaced.
    """

    supports_higher_order_operators = True

    def __init__(self, ignore: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.work = Work()
        self.saved: dict[int, int] = {}
        self._ignore: set[int] = set()
        self._weights: dict[int, torch.UntypedStorage] = {}  # by address; alive, as an address is used again otherwise
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
        formula = formula_of(func)
        if formula is not None:
            self.work.flops += int(formula(*args, **(kwargs or {}), out_val=result))
            self.work.traffic += _bytes(args, kwargs, result)
        if self._weights:
            self._look_for_weights(func, (args, kwargs), result, counted=formula is not None)
        return result

    @property
    def flops(self) -> int:
        """FLOPs of the operators with a formula."""
        return self.work.flops

    def watch_weights(self, weights: Iterable[Tensor]) -> None:
        """Take these tensors, and no others, for weights: what reads them should have a formula."""
        storages = [weight.untyped_storage() for weight in weights if weight.layout is torch.strided]
        self._weights = {storage._cdata: storage for storage in storages}

    def _look_for_weights(self, func: Any, arguments: Any, result: Any, *, counted: bool) -> None:
        """Note an operator that reads weights and has no formula; what is made of weights alone are weights, too."""
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        others = [
            t for t in tensors if t.layout is not torch.strided or t.untyped_storage()._cdata not in self._weights
        ]
        if len(others) == len(tensors):
            return
        if all(map(_is_setting, others)):  # what is done to weights alone costs the same however large the batch is
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            storages = [tensor.untyped_storage() for tensor in made if tensor.layout is torch.strided]
            self._weights |= {storage._cdata: storage for storage in storages}
        elif not counted and not is_free(func) and (_is_of_users(func) or any(map(_is_activation, others))):
            name, size = name_of(func), _bytes(*arguments, result)
            self.work.uncounted[name] = self.work.uncounted.get(name, 0) + size

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


def _is_setting(tensor: Tensor) -> bool:
    """Whether a tensor may be a scale or a zero point, and not activations."""
    return tensor.numel() == 1 or (tensor.dim() < 2 and tensor.is_floating_point())


def _is_activation(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and (tensor.is_floating_point() or tensor.is_complex())


def _is_of_users(operator: Any) -> bool:
    return getattr(operator, "namespace", "") not in ("aten", "prim", "prims")


def _bytes(*values: Any) -> int:
    """Return the bytes of all tensors in nested values."""
    return sum(leaf.numel() * leaf.itemsize for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


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
