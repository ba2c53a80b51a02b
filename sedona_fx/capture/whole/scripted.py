"""TorchScript inside a model: functions become one node each, and modules are copied with parameters of their own.

Functions (``@torch.jit.script``) take real tensors only and have no Python code to record. One reads nothing but its
arguments, so a node that calls it is all there is to know.

``copy.deepcopy`` of a ``torch.jit.ScriptModule`` clones its parameters with their autograd graph, so that gradients go
to the original; and it knows nothing of tensors that are tied to other modules, or are to be shared. Functions of
TorchScript among the attributes of a module cannot be copied at all; they have no state, so a copy has the same ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.rng import turn

_HOOK = "__deepcopy__"


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


_known: WeakValueDictionary[int, Scripted] = WeakValueDictionary()


def _as_function(function: Any) -> Scripted:
    """Return one object a function, as long as a graph has it, so that two graphs can be compared."""
    return _known.setdefault(id(function), Scripted(function))  # what it holds lives, so no other gets the id


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


def scripted_modules(module: nn.Module) -> list[Any]:
    """Return the TorchScript modules in a module, those inside of each other included."""
    return [inner for inner in module.modules() if isinstance(inner, torch.jit.ScriptModule)]


@contextmanager
def copied_right(module: nn.Module) -> Iterator[None]:
    """Let ``copy.deepcopy`` copy the TorchScript modules in `module` as it copies others, for the time of the body.

    The copies, and copies of these, are copied in this way for good, and so are functions of TorchScript.
    """
    functions = (value for inner in module.modules() for value in vars(inner).values())
    if any(isinstance(value, torch.jit.ScriptFunction) for value in functions):
        torch.jit.ScriptFunction.__deepcopy__ = _same  # type: ignore[attr-defined]
    with turn():  # another thread that copies the same modules has to find the marks, until it is done
        marked = [inner for inner in scripted_modules(module) if _HOOK not in vars(inner)]
        for inner in marked:
            vars(inner)[_HOOK] = functools.partial(_copied, inner)
        try:
            yield
        finally:
            for inner in marked:
                del vars(inner)[_HOOK]


def _same(function: Any, memo: dict[int, Any]) -> Any:
    return function


def _copied(module: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a TorchScript module; tensors that are in `memo` stand for those of the original."""
    result = torch.jit._recursive.wrap_cpp_module(copy.deepcopy(module._c, memo))
    for inner, new in zip(module.modules(), result.modules(), strict=True):
        for name, tensor in inner._parameters.items():
            new._c.setattr(name, _copied_tensor(tensor, memo, parameter=True))
        for name, tensor in inner._buffers.items():
            new._c.setattr(name, _copied_tensor(tensor, memo, parameter=False))
        vars(new)[_HOOK] = functools.partial(_copied, new)
    memo[id(module)] = result
    return result


def _copied_tensor(tensor: Tensor, memo: dict[int, Any], *, parameter: bool) -> Any:
    if id(tensor) not in memo:
        new = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
        memo.setdefault(id(memo), []).append(tensor)  # alive, so that no other object gets its id
    return memo[id(tensor)]
