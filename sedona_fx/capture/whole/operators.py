"""Modules that stay whole in a program that ``torch.export`` captures: a call of one is one operator of the program.

``torch.export`` looks into every module. While it runs, the forward of a module that stays whole calls an operator of
this file, which stands in the program until :mod:`sedona_fx.capture.convert` makes a call of the module of it. What the
module returns is found out by running a copy of it on noise, of two batch sizes where the batch is free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree

from sedona_fx.capture.host_calls import replaced_forward
from sedona_fx.capture.whole.scripted import copied_right

_running: list[WholeCall] = []
"""The calls of the export that runs, by the number that the operator gets."""


@torch.library.custom_op("sedona_fx::whole", mutates_args=())
def whole(tensors: list[Tensor], call: int) -> list[Tensor]:
    """Stands for a call of a module; only exported programs have it, and nobody runs these."""
    raise AssertionError("an exported program has been run before it was converted")


@whole.register_fake
def _(tensors: list[Tensor], call: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=t.dtype, device=t.device) for shape, t in _running[call].returned]


WHOLE = torch.ops.sedona_fx.whole.default


class WholeCall:
    """One call of a module that stays whole, while a program is captured.

    Args:
        path: of the module.
        stand_in: a copy of the module.
        given: its arguments, as (args, kwargs).

    Attributes:
        path: as given.
        tensors: those among the arguments.
        returned: for each tensor that the module returns, its shape with the program's symbols, and one like it.
    """

    def __init__(self, path: str, stand_in: nn.Module, given: Any) -> None:
        self.path = path
        leaves, self._given = pytree.tree_flatten(given)
        self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes: list[Any] = [size for t in self.tensors for size in t.shape if isinstance(size, torch.SymInt)]
        batch: Any = next((size for size in sizes if size.node.expr.is_Symbol), None)
        runs = [self._run(stand_in, batch, more) for more in ((0,) if batch is None else (0, 1))]
        leaves, spec = pytree.tree_flatten(runs[0])
        numbers = iter(range(len(leaves)))
        values = [next(numbers) if isinstance(leaf, Tensor) else _Plain(leaf) for leaf in leaves]
        self._result = spec.unflatten(values)
        found, *others = [[t for t in pytree.tree_leaves(run) if isinstance(t, Tensor)] for run in runs]
        self.returned = [(_shape(t, u, batch), t) for t, u in zip(found, others[0] if others else found, strict=True)]

    def arguments(self, tensors: Sequence[Any]) -> Any:
        """Return (args, kwargs) of the call with other values in the place of its tensors."""
        values = iter(tensors)
        return self._given.unflatten(
            [next(values) if tensor else plain for tensor, plain in zip(self._is_tensor, self._plain, strict=True)]
        )

    def result(self, tensors: Sequence[Any]) -> Any:
        """Return what the module returns, with these values in the place of its tensors."""
        return pytree.tree_map(lambda v: v.value if isinstance(v, _Plain) else tensors[v], self._result)

    def keys(self, number: int) -> tuple[Any, ...]:
        """Return the pytree keys that lead to a tensor in what the module returns."""
        paths, _ = pytree.tree_flatten_with_path(self._result)
        return next(keys for keys, leaf in paths if not isinstance(leaf, _Plain) and leaf == number)

    def _run(self, stand_in: nn.Module, batch: Any, more: int) -> Any:
        """Return what the copy returns for noise, with as many more examples as asked for."""
        symbol = None if batch is None else batch.node.expr

        def size_of(size: Any) -> int:
            if not isinstance(size, torch.SymInt):
                return int(size)
            node: Any = size.node
            return int(node.expr.xreplace({symbol: batch.node.hint + more}) if more else node.hint)

        shapes = [tuple(map(size_of, tensor.shape)) for tensor in self.tensors]
        # Outside of the capture, which would record operators and refuse derivatives.
        with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
            noise = [_noise(shape, tensor) for shape, tensor in zip(shapes, self.tensors, strict=True)]
            args, kwargs = self.arguments(noise)
            return pytree.tree_map_only(Tensor, Tensor.detach, stand_in(*args, **kwargs))


class _Plain:
    """A value that is no tensor, in what a module returns."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def whole_calls(model: nn.Module, leaves: Iterable[nn.Module]) -> Iterator[list[WholeCall]]:
    """Let modules of a model become one operator a call in the body, in which the model is exported.

    Args:
        model: the model.
        leaves: the modules.

    Yields:
        The calls, by the second argument of the operator.
    """
    paths = {module: path for path, module in model.named_modules()}
    calls: list[WholeCall] = []
    global _running
    before, _running = _running, calls

    def forward_of(leaf: nn.Module) -> Callable[..., Any]:
        path, original = paths[leaf], leaf.forward
        with copied_right(leaf):
            stand_in = copy.deepcopy(leaf)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, FakeTensor) for value in pytree.tree_leaves((args, kwargs))):
                return original(*args, **kwargs)  # the model runs as it is
            call = WholeCall(path, stand_in, (args, kwargs))
            calls.append(call)
            return call.result(whole(call.tensors, len(calls) - 1))

        return forward

    try:
        with ExitStack() as stack:
            for leaf in leaves:
                stack.enter_context(replaced_forward(leaf, forward_of(leaf)))
            yield calls
    finally:
        _running = before


def _shape(tensor: Tensor, larger: Tensor, batch: Any) -> list[Any]:
    """Return the shape of a tensor for a free batch, from those for the example's size and for one more."""
    hint = 0 if batch is None else batch.node.hint
    return [n if n == m else (m - n) * (batch - hint) + n for n, m in zip(tensor.shape, larger.shape, strict=True)]


def _noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor like another one: noise that requires a gradient if that holds floats, else zeros."""
    if not (like.dtype.is_floating_point or like.dtype.is_complex):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    generator = torch.Generator(like.device).manual_seed(0)
    noise = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    return noise.requires_grad_().clone()  # not a leaf: the module may write to it
