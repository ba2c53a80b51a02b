"""Functions of TorchScript (``@torch.jit.script``), recorded as one node each.

They take real tensors only and have no Python code to record. A function reads nothing but its arguments, so a node
that calls it is all there is to know.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class Scripted:
    """A function of TorchScript as a plain callable: to fx, all functions of TorchScript have one and the same name.

    Args:
        function: the function.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = str(function.name)
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return self  # it has no state


_as_function = functools.cache(Scripted)  # one object a function, so that two graphs can be compared


@contextmanager
def scripted_calls_recorded() -> Iterator[None]:
    """Record calls of TorchScript functions on proxies in the body."""
    kind = torch.jit.ScriptFunction
    original = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        if not proxies:
            return original(self, *args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", _as_function(self), args, kwargs)

    kind.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__call__ = original  # type: ignore[method-assign]
