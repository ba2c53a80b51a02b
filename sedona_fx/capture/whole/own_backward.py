"""The user's own backwards: a ``torch.autograd.Function`` whose forward is recorded would lose its backward.

Symbolic tracing makes a call one node, which runs the function. ``torch.export`` records what the forward does; there
the module that calls the function has to stay whole.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.whole.reasons import NeedsTensors


class OwnFunction:
    """A call of the user's ``torch.autograd.Function`` as a plain callable: to fx, ``apply`` is the same name for all.

    Args:
        kind: the class of the function.
    """

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; on a proxy, as when a graph that was pickled is made again, record the call."""
        if proxies := [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]:
            return proxies[0].tracer.create_proxy("call_function", self, args, kwargs)
        return self.kind.apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnFunction:
        return self  # it has no state

    def __reduce__(self) -> str:
        return _PREFIX + f"{self.kind.__module__}:{self.kind.__qualname__}".encode().hex()


_known: WeakValueDictionary[type, OwnFunction] = WeakValueDictionary()  # one object a class: graphs can be compared
_PREFIX = "own_function_"


def __getattr__(name: str) -> Any:
    """Return a function by the name that it has in a pickle, ``own_function_`` and its place in hexadecimal digits."""
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, path = bytes.fromhex(name.removeprefix(_PREFIX)).decode().split(":")
    return own_function(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def own_function(kind: Any) -> OwnFunction:
    """Return the callable that stands for a class of functions."""
    return _known.setdefault(kind, OwnFunction(kind))


@contextmanager
def own_functions_recorded() -> Iterator[None]:
    """Record calls of the user's functions on proxies in the body."""

    def on_call(kind: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        recorded = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        return own_function(kind)(*args, **kwargs) if recorded else call(*args, **kwargs)

    with _watching(on_call):
        yield


@contextmanager
def watch_own_backwards(model: nn.Module) -> Iterator[dict[str, str]]:
    """Yield a dictionary: path of the innermost module whose code called such a function in the body -> its name."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, str] = {}

    def on_call(kind: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        found.setdefault(_innermost(paths), kind.__name__)
        return call(*args, **kwargs)

    with _watching(on_call):
        yield found


def raise_for_whole(found: dict[str, str], whole: Collection[str]) -> None:
    """Raise :class:`NeedsTensors` for the first module found that is not kept whole yet, nor the model itself."""
    for path, function in found.items():
        if path and not any(f"{path}.".startswith(f"{other}.") for other in whole):
            raise NeedsTensors(
                f"it has a backward of its own ({function}, a torch.autograd.Function), which a graph would lose", path
            )


@contextmanager
def _watching(on_call: Callable[..., Any]) -> Iterator[None]:
    """Let ``on_call(class, call, args, kwargs)`` stand for each call of a function that is not PyTorch's own."""
    kind: Any = torch.autograd.Function
    original: Any = vars(kind)["apply"]  # a method of the class, in Python or in C

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = original.__get__(None, cls)
        if cls.__module__.partition(".")[0] == "torch":
            return call(*args, **kwargs)
        return on_call(cls, call, args, kwargs)

    kind.apply = classmethod(apply)
    try:
        yield
    finally:
        kind.apply = original


def _innermost(paths: dict[int, str]) -> str:
    """Return the path of the innermost module among the callers."""
    frame = sys._getframe()
    while frame is not None:
        if (path := paths.get(id(frame.f_locals.get("self")))) is not None:
            return path
        frame = frame.f_back  # type: ignore[assignment]
    return ""
