"""In-place operators of Python, recorded as functions that write to their first argument and return it.

fx records ``x += y`` as ``x + y`` and refuses ``x[k] = v``. The first hides a write from readers of ``x`` under another
name, and takes more memory than the model does. Recording ``operator.iadd`` would not help: fx prints it as a statement
that rebinds the old name, which is wrong for numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function become one graph node when it is called on a proxy, in our traces and in later traces by fx."""

    @functools.wraps(function)
    def call(target: Any, *args: Any) -> Any:
        if isinstance(target, fx.Proxy):
            return target.tracer.create_proxy("call_function", call, (target, *args), {})
        return function(target, *args)

    return call


@_recorded
def setitem(target: Any, key: Any, value: Any) -> Any:
    """``target[key] = value``."""
    target[key] = value
    return target


@_recorded
def iadd(target: Any, value: Any) -> Any:
    """``target += value``."""
    target += value
    return target


@_recorded
def isub(target: Any, value: Any) -> Any:
    """``target -= value``."""
    target -= value
    return target


@_recorded
def imul(target: Any, value: Any) -> Any:
    """``target *= value``."""
    target *= value
    return target


@_recorded
def itruediv(target: Any, value: Any) -> Any:
    """``target /= value``."""
    target /= value
    return target


@_recorded
def iand(target: Any, value: Any) -> Any:
    """``target &= value``."""
    target &= value
    return target


@_recorded
def ior(target: Any, value: Any) -> Any:
    """``target |= value``."""
    target |= value
    return target


WRITES = (setitem, iadd, isub, imul, itruediv, iand, ior)
"""Functions that overwrite their first argument and return it."""


class InplaceProxy(fx.Proxy):
    """An fx proxy that records Python's in-place operators as the functions above, and a tensor's ``requires_grad``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name in ("data", "grad"):
            raise TypeError(f"it sets `.{name}` of a tensor, which a graph does not record")
        else:
            super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        setitem(self, key, value)

    def __iadd__(self, value: Any) -> Any:
        return iadd(self, value)

    def __isub__(self, value: Any) -> Any:
        return isub(self, value)

    def __imul__(self, value: Any) -> Any:
        return imul(self, value)

    def __itruediv__(self, value: Any) -> Any:
        return itruediv(self, value)

    def __iand__(self, value: Any) -> Any:
        return iand(self, value)

    def __ior__(self, value: Any) -> Any:
        return ior(self, value)
