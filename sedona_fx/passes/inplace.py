"""In-place operators of Python, recorded as what they are: functions that write and return what they wrote to.

fx records ``x += y`` as ``x + y`` and refuses ``x[k] = v``. The first hides a write from whoever reads ``x`` under
another name, and takes more memory than the model does. ``operator.iadd`` would not do either: fx prints it as a
statement that rebinds the old name, which is wrong for numbers.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def setitem(target: Any, key: Any, value: Any) -> Any:
    """``target[key] = value``."""
    target[key] = value
    return target


def iadd(target: Any, value: Any) -> Any:
    """``target += value``."""
    target += value
    return target


def isub(target: Any, value: Any) -> Any:
    """``target -= value``."""
    target -= value
    return target


def imul(target: Any, value: Any) -> Any:
    """``target *= value``."""
    target *= value
    return target


def itruediv(target: Any, value: Any) -> Any:
    """``target /= value``."""
    target /= value
    return target


def iand(target: Any, value: Any) -> Any:
    """``target &= value``."""
    target &= value
    return target


def ior(target: Any, value: Any) -> Any:
    """``target |= value``."""
    target |= value
    return target


WRITES = (setitem, iadd, isub, imul, itruediv, iand, ior)
"""Functions that overwrite their first argument and return it."""


class InplaceProxy(fx.Proxy):
    """fx's stand-in for a value while tracing, with Python's in-place operators."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", setitem, (self, key, value), {})

    def __iadd__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", iadd, (self, value), {})

    def __isub__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", isub, (self, value), {})

    def __imul__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", imul, (self, value), {})

    def __itruediv__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", itruediv, (self, value), {})

    def __iand__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", iand, (self, value), {})

    def __ior__(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", ior, (self, value), {})
