"""Model inputs: how the inputs of a batch become the arguments of the user's ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from sedona_fx.errors import DataError


class Args:
    """The arguments of one call of the model: ``Args(x, mask=m)`` stands for ``model(x, mask=m)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, inputs: Any) -> Args:
        """Return the arguments for inputs as a data loader gives them.

        Args:
            inputs: a tuple of positional arguments, a mapping of keyword arguments, arguments as `Args`, or the single
                argument (a namedtuple included).

        Raises:
            DataError: the keys of a mapping are not texts.
        """
        if isinstance(inputs, Args):
            return inputs
        if isinstance(inputs, Mapping):
            if not all(isinstance(name, str) for name in inputs):
                raise DataError(
                    f"a mapping of inputs is taken as keywords, and {list(inputs)[:3]} are no names of arguments. For "
                    "a model that takes a mapping as its one argument, write sedona_fx.Args(mapping)."
                )
            return cls(**inputs)
        if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
            return cls(*inputs)
        return cls(inputs)

    def bind(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Return argument name -> value for the arguments whose value is not just the default.

        Args:
            forward: the method that is called with the arguments.

        Raises:
            DataError: the arguments do not fit the signature of `forward`, or it takes some of them without a name.
        """
        signature = _signature(forward)
        try:
            bound = signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise DataError(
                f"the inputs do not fit the model's forward{signature}: {error}. A tuple of inputs is taken as "
                "positional arguments, a mapping as keywords; sedona_fx.Args(...) says it explicitly."
            ) from None
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(value)
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
                raise DataError(
                    f"the model's forward{signature} takes {str(parameter)!r} without a name to call it by. Wrap the "
                    "model in a module whose forward names every input."
                )
            elif not same_plain(value, parameter.default):
                named[name] = value
        return named

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Args:
        """Return a copy with a function applied to every tensor."""
        mapped = pytree.tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Args(*mapped[0], **mapped[1])

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor among the arguments, those in nested values included."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def batch_size(self) -> int | None:
        """Return the size of the first dimension if it is the same for all tensors that have one, else None."""
        sizes = {t.shape[0] for t in self.tensors() if t.dim() > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def first(self, count: int) -> Args:
        """Return the first `count` examples; unchanged if there are no more, or without a common batch dimension."""
        size = self.batch_size()
        if size is None or size <= count:
            return self
        return self.map(lambda t: t[:count] if t.dim() > 0 else t)

    def __repr__(self) -> str:
        def text(value: Any) -> str:
            return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__

        parts = [text(value) for value in self.args] + [f"{name}={text(value)}" for name, value in self.kwargs.items()]
        return f"Args({', '.join(parts)})"


def same_plain(first: Any, second: Any) -> bool:
    """Whether two values without tensors are equal. A list equals a tuple of the same elements, as in JSON."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same_plain, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_plain(first[key], second[key]) for key in first)
    if first is second:
        return True
    plain = (bool, int, float, str, bytes, torch.dtype, torch.device)
    return type(first) is type(second) and isinstance(first, plain) and bool(first == second)


_signatures: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a method; those of one function are looked up once, as every step asks for one."""
    function = getattr(forward, "__func__", None)
    if function is None:
        return inspect.signature(forward)
    found = _signatures.get(function)
    if found is None:
        found = _signatures[function] = inspect.signature(forward)
    return found
