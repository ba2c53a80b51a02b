"""Modules that stay whole in a program that ``torch.export`` captures: a call of one is one operator of the program.

``torch.export`` looks into every module. While it runs, the forward of a module that stays whole calls an operator of
this file, which stands in the program until :mod:`sedona_fx.capture.exporting.convert` makes a call of the module of
it. What the module returns is found out by running a copy of it on noise, of several sizes where sizes are free.
"""

from __future__ import annotations

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
from sedona_fx.errors import TraceError
from sedona_fx.ir.copies import deep_copy
from sedona_fx.rng import seeded

_running: list[WholeCall] = []
"""The calls of the export that runs, by the number that the operator gets."""


@torch.library.custom_op("sedona_fx::whole", mutates_args=())
def whole(tensors: list[Tensor], sizes: Sequence[int], call: int) -> list[Tensor]:
    """Stands for a call of a module; only exported programs have it, and nobody runs these."""
    raise AssertionError("an exported program has been run before it was converted")


@whole.register_fake
def _(tensors: list[Tensor], sizes: Sequence[int], call: int) -> list[Tensor]:
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
        sizes: the symbols for sizes among the arguments.
        returned: for each tensor that the module returns, its shape with the program's symbols, and one like it.

    Raises:
        TraceError: a size of what the module returns is no linear function of a free size of its arguments, or it
            depends on numbers in tensors or on draws; so does a number that the module returns.
    """

    def __init__(self, path: str, stand_in: nn.Module, given: Any) -> None:
        self.path = path
        leaves, self._given = pytree.tree_flatten(given)
        self._leaves = [_Slot(type(leaf)) if isinstance(leaf, (Tensor, torch.SymInt)) else leaf for leaf in leaves]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
        self.returned = self._asked_of(stand_in)

    def arguments(self, tensors: Sequence[Any], sizes: Sequence[Any]) -> Any:
        """Return (args, kwargs) of the call with other values in the place of its tensors and sizes."""
        values = {True: iter(sizes), False: iter(tensors)}
        return self._given.unflatten(
            [
                next(values[issubclass(leaf.kind, torch.SymInt)]) if isinstance(leaf, _Slot) else leaf
                for leaf in self._leaves
            ]
        )

    def result(self, tensors: Sequence[Any]) -> Any:
        """Return what the module returns, with these values in the place of its tensors."""
        return pytree.tree_map(lambda v: v.value if isinstance(v, _Plain) else tensors[v], self._result)

    def keys(self, number: int) -> tuple[Any, ...]:
        """Return the pytree keys that lead to a tensor in what the module returns."""
        paths, _ = pytree.tree_flatten_with_path(self._result)
        return next(keys for keys, leaf in paths if not isinstance(leaf, _Plain) and leaf == number)

    def _asked_of(self, stand_in: nn.Module) -> list[tuple[list[Any], Tensor]]:
        """Run a copy of the module for `returned`, at the example's sizes and with each free size larger by one."""
        sizes: list[Any] = [size for t in self.tensors for size in t.shape if isinstance(size, torch.SymInt)]
        sizes += self.sizes
        others = any(isinstance(leaf, (torch.SymFloat, torch.SymBool)) for leaf in self._leaves)
        if others or not all(size.node.has_hint() for size in sizes):
            raise TraceError(
                f"{self.path!r} stays whole, and it gets a number that code before it has read from a tensor. Hand it "
                "the tensor, and let it read the number itself."
            )
        free = {size.node.expr: size for size in sizes if size.node.expr.is_Symbol}
        self._hints = {symbol: size.node.hint for symbol, size in free.items()}
        result = self._run(stand_in)
        leaves, spec = pytree.tree_flatten(result)
        numbers = iter(range(len(leaves)))
        self._result = spec.unflatten([next(numbers) if isinstance(t, Tensor) else _Plain(t) for t in leaves])
        found = _tensors(result)
        self._check_that_it_is_sure(result, stand_in)
        shapes: list[list[Any]] = [list(t.shape) for t in found]
        at_all = [list(t.shape) for t in found]  # with all free sizes larger, if it is linear in them
        for symbol, size in free.items():
            for k, larger in enumerate(_tensors(self._run(stand_in, symbol))):
                for dim, (n, m) in enumerate(zip(found[k].shape, larger.shape, strict=True)):
                    if n != m:
                        shapes[k][dim] = shapes[k][dim] + (m - n) * (size - self._hints[symbol])
                        at_all[k][dim] += m - n
        if len(free) > 1 and at_all != [list(t.shape) for t in _tensors(self._run(stand_in, *free))]:
            raise TraceError(f"{self.path!r} stays whole, and its sizes are no linear functions of those that it gets")
        return list(zip(shapes, found, strict=True))

    def _check_that_it_is_sure(self, result: Any, stand_in: nn.Module) -> None:
        """Raise TraceError if the module returns other sizes, or other values that are no tensors, on other numbers."""
        try:
            other = self._run(stand_in, seed=1)
        except Exception:  # not all numbers are valid: an index may be too large
            return
        leaves, others = pytree.tree_leaves(result), pytree.tree_leaves(other)
        if [type(leaf) for leaf in leaves] == [type(leaf) for leaf in others]:
            pairs = list(zip(leaves, others, strict=True))
            sizes_same = all(a.shape == b.shape for a, b in pairs if isinstance(a, Tensor))
            if sizes_same and all(_same(a, b) for a, b in pairs if not isinstance(a, Tensor)):
                return
        raise TraceError(
            f"{self.path!r} stays whole, and what it returns has sizes, or values that are no tensors, which depend on "
            "the numbers in its inputs or on random numbers: the code behind it would be recorded for one of them. Let "
            "it return a tensor of a fixed size (a mask in place of a part), or put the code that needs them into it."
        )

    def _run(self, stand_in: nn.Module, *larger: Any, seed: int = 0) -> Any:
        """Return what the copy returns for noise of the example's sizes; those of some symbols are larger by one."""
        values = {symbol: hint + (symbol in larger) for symbol, hint in self._hints.items()}

        def size_of(size: Any) -> int:
            if not isinstance(size, torch.SymInt):
                return int(size)
            node: Any = size.node
            return int(node.expr.xreplace(values) if node.expr.free_symbols <= values.keys() else node.hint)

        shapes = [tuple(map(size_of, tensor.shape)) for tensor in self.tensors]
        device = self.tensors[0].device if self.tensors else torch.device("cpu")
        # Outside of the capture, which would record operators and refuse derivatives.
        with (
            unset_fake_temporarily(),
            disable_proxy_modes_tracing(),
            torch._C.DisableTorchFunction(),
            seeded(device, seed),
        ):
            noise = [_noise(shape, tensor, seed) for shape, tensor in zip(shapes, self.tensors, strict=True)]
            args, kwargs = self.arguments(noise, [size_of(size) for size in self.sizes])
            return pytree.tree_map_only(Tensor, Tensor.detach, stand_in(*args, **kwargs))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _same(first: Any, second: Any) -> bool:
    """Whether two values that are no tensors count as the same; what cannot be compared does."""
    try:
        return bool(first is second or first == second or (first != first and second != second))
    except Exception:
        return True


class _Slot:
    """The place of a tensor or of a size among the arguments of a call."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


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
            stand_in = deep_copy(leaf)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, FakeTensor) for value in pytree.tree_leaves((args, kwargs))):
                return original(*args, **kwargs)  # the model runs as it is
            call = WholeCall(path, stand_in, (args, kwargs))
            calls.append(call)
            return call.result(whole(call.tensors, call.sizes, len(calls) - 1))

        return forward

    try:
        with ExitStack() as stack:
            for leaf in leaves:
                stack.enter_context(replaced_forward(leaf, forward_of(leaf)))
            yield calls
    finally:
        _running = before


def _noise(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Return a tensor like another one: noise that requires a gradient if that holds floats, else `seed` throughout."""
    if not (like.dtype.is_floating_point or like.dtype.is_complex):
        return torch.full(shape, seed, dtype=like.dtype, device=like.device)
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    return noise.requires_grad_().clone()  # not a leaf: the module may write to it
