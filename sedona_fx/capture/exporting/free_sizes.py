"""Which sizes of inputs an exported program leaves free: found out by the program's own guards, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sedona_fx.plan_values import FreeSize

_BATCH_SIZES = (2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 128, 1000, 1024)
_SIZES = (*range(2, 41), 48, 49, 64, 77, 100, 127, 128, 129, 192, 224, 256, 384, 500, 512, 1000, 1024)
_UNBOUNDED = 2**31
"""A bound that is larger is none: torch.export's symbols for sizes end somewhere."""


class GuardedProgram:
    """An exported program, its graph, and the arguments that it was exported with.

    Args:
        program: what torch.export returned.
        source: its graph.
        arguments: argument name -> value.
    """

    def __init__(
        self, program: torch.export.ExportedProgram, source: fx.GraphModule, arguments: Mapping[str, Any]
    ) -> None:
        self.program = program
        self.symbolic = [node.meta.get("val") for node in source.graph.nodes if node.op == "placeholder"]
        # Guards take the inputs in the order of the forward's signature, which may differ from that of `arguments`.
        ordered = pytree.tree_unflatten(list(range(len(self.symbolic))), program.call_spec.in_spec)[1]
        self.values = pytree.tree_leaves({name: arguments[name] for name in ordered})
        self.tensors = {name: index for name, index in ordered.items() if isinstance(index, int)}
        self._guards = getattr(source, "_guards_fn", None)  # older versions of PyTorch keep them elsewhere

    def holds(self, sized: Callable[[int, Tensor], Tensor]) -> bool:
        """Whether the guards let pass what `sized` makes of each input tensor, given its index; True without guards."""
        if self._guards is None:
            return True
        try:
            self._guards(
                *(
                    sized(index, value.to("meta")) if isinstance(value, Tensor) and value.dim() else value
                    for index, value in enumerate(self.values)
                )
            )
        except AssertionError:
            return False
        return True

    def serves_every_batch(self) -> bool:
        """Whether the program is right for other batch sizes too.

        The program of a forward that branches on the batch size is right for some sizes only; its guards tell which.
        """
        if any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], int) for v in self.symbolic):
            return False
        return all(
            self.holds(lambda _, tensor, size=size: tensor[:1].expand(size, *tensor.shape[1:]))  # type: ignore[misc]
            for size in _BATCH_SIZES
        )

    def free_sizes(self) -> tuple[FreeSize, ...]:
        """Return the sizes of input tensors, besides the batch, for which the program is right whatever they are.

        A symbol that is bound to others, or for which a guard fails on any of some fifty sizes, counts as fixed.
        """
        symbols = {name: self._symbols(index) for name, index in self.tensors.items()}
        batch = {found.get(0) for found in symbols.values()}
        free = []
        for name, found in symbols.items():
            for dim, symbol in found.items():
                if dim == 0 or symbol in batch or self._guards is None:
                    continue
                least, most = self._range(symbol)
                if self._serves(symbol, least, most):
                    free.append(FreeSize(name=name, dim=dim, symbol=str(symbol), least=least, most=most))
        return tuple(free)

    def _symbols(self, index: int) -> dict[int, Any]:
        """Return dimension -> symbol for the sizes of an input that are symbols by themselves."""
        value = self.symbolic[index]
        sizes: Iterable[tuple[int, Any]] = enumerate(value.shape) if isinstance(value, Tensor) else ()
        expressions: dict[int, Any] = {d: s.node.expr for d, s in sizes if isinstance(s, torch.SymInt)}
        return {dim: expression for dim, expression in expressions.items() if expression.is_Symbol}

    def _range(self, symbol: Any) -> tuple[int, int | None]:
        bounds = self.program.range_constraints.get(symbol)
        least: Any = bounds.lower if bounds is not None else 2
        most: Any = bounds.upper if bounds is not None else None
        bounded = getattr(most, "is_Integer", False) and int(most) < _UNBOUNDED  # infinity is no Integer of sympy
        return max(2, int(least)), int(most) if bounded else None

    def _serves(self, symbol: Any, least: int, most: int | None) -> bool:
        places = {index: [d for d, s in self._symbols(index).items() if s == symbol] for index in self._indices()}

        def sized(index: int, tensor: Tensor, size: int) -> Tensor:
            shape = [size if dim in places.get(index, ()) else extent for dim, extent in enumerate(tensor.shape)]
            return tensor.new_empty(shape)

        near = (least, least + 1, *(() if most is None else (most - 1, most)))
        wanted = sorted(size for size in {*_SIZES, *near} if size >= least and (most is None or size <= most))
        return all(
            self.holds(lambda index, tensor, size=size: sized(index, tensor, size))  # type: ignore[misc]
            for size in wanted
        )

    def _indices(self) -> Iterator[int]:
        return iter(self.tensors.values())


def in_both(train: tuple[FreeSize, ...], evaluation: tuple[FreeSize, ...]) -> tuple[FreeSize, ...]:
    """Return the sizes that the recordings of both modes leave free, equal where one of them has them equal."""
    others = {(size.name, size.dim): size for size in evaluation}
    both = [(size, others[size.name, size.dim]) for size in train if (size.name, size.dim) in others]
    group = {size.symbol: size.symbol for size, _ in both}  # symbol of the train graph -> one for all that are equal
    first: dict[str, str] = {}
    for size, other in both:
        one = first.setdefault(other.symbol, group[size.symbol])
        before = group[size.symbol]
        group = {symbol: one if kept == before else kept for symbol, kept in group.items()}
    return tuple(
        replace(size, symbol=group[size.symbol], least=max(size.least, other.least), most=_smaller(size, other))
        for size, other in both
    )


def _smaller(size: FreeSize, other: FreeSize) -> int | None:
    return min((most for most in (size.most, other.most) if most is not None), default=None)
