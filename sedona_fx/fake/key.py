"""Keys for operations: everything that the effect of an operation on fake tensors can depend on, as a hashable value.

A key holds the operation, its plain arguments, and for each tensor its geometry and which other tensors it shares
memory with. Code of the user and values that may hide tensors cannot be described in this way; they raise `NoKey`.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from sedona_fx.fake.tensors import Abstract, Storage, Storages, geometry

PLAIN_TYPES = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types whose values are part of a key as they are."""
_PURE_MODULES = ("torch", "torchvision", "_operator", "operator", "builtins", "math", "sedona_fx")
_READABLE = frozenset({"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "T", "mT", "H", "mH"})
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


class NoKey(Exception):
    """A value that no key can describe."""


class KeyReader:
    """Turns arguments into keys, and collects the tensors in them, each once.

    Args:
        env: the value of every node of the graph that ran before.
    """

    def __init__(self, env: Mapping[fx.Node, Any]) -> None:
        self.env = env
        self.tensors: list[Tensor | Abstract] = []
        self._positions: dict[int, int] = {}

    def value(self, value: Any) -> Hashable:
        """Return the key of a value: equal for equal values of one type. Tensors are given by their positions."""
        kind = type(value)
        if kind is fx.Node:
            return self.value(self.env[value])
        if kind in PLAIN_TYPES:
            return kind, value  # with the type, since 1 == 1.0 == True
        if isinstance(value, Tensor | Abstract):
            position = self._positions.setdefault(id(value), len(self.tensors))
            if position == len(self.tensors):
                self.tensors.append(value)
            return Tensor, position
        if isinstance(value, tuple | list):  # lists of fx included
            return kind, tuple(map(self.value, value))
        if isinstance(value, dict):
            return kind, tuple((self.value(name), self.value(item)) for name, item in value.items())
        if kind is slice:
            return kind, self.value((value.start, value.stop, value.step))
        raise NoKey

    def module(self, module: nn.Module, mode_matters: bool = False) -> Hashable:
        """Return the key of a module of PyTorch's own: its class, its attributes and tensors, and its submodules.

        The training mode is left out if no code reads it, so that the train graph and the eval graph share as many
        effects as they can.

        Args:
            module: the module.
            mode_matters: whether a module around it reads the training mode.
        """
        kind = type(module)
        if not kind.__module__.startswith("torch.nn.modules."):
            raise NoKey
        mode_matters = mode_matters or _reads_mode(kind)  # type: ignore[arg-type]
        left_out = _REGISTRIES if mode_matters else _REGISTRIES | {"training"}
        attributes = [(name, self._attribute(value)) for name, value in vars(module).items() if name not in left_out]
        tensors = {**module._parameters, **module._buffers}
        children = [
            (name, None if child is None else self.module(child, mode_matters))
            for name, child in module._modules.items()
        ]
        return kind, tuple(attributes), self.value(tensors), tuple(children)

    def _attribute(self, value: Any) -> Hashable:
        if isinstance(value, dict) and not value:  # no hooks
            return None
        # An activation function.
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and is_pure(value):
            return value
        before = len(self.tensors)
        key = self.value(value)
        if len(self.tensors) > before:  # the forward pass may replace a tensor that is no parameter or buffer
            raise NoKey
        return key


@functools.cache
def _reads_mode(kind: type) -> bool:
    """Whether any code of a class, or of its base classes, names ``training``."""

    def names_training(code: types.CodeType) -> bool:
        inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        return "training" in code.co_names or any(map(names_training, inner))

    functions = [f for base in kind.__mro__ if base not in (nn.Module, object) for f in vars(base).values()]
    return any(names_training(f.__code__) for f in functions if isinstance(f, types.FunctionType))


def operation_key(node: fx.Node, env: Mapping[fx.Node, Any]) -> Hashable:
    """Return what a node calls, if PyTorch or Python defines all that it does.

    Raises:
        NoKey: it may do anything.
    """
    if node.op == "call_method":
        if isinstance(node.args[0], fx.Node) and isinstance(env[node.args[0]], Tensor | Abstract):
            return str(node.target)
        raise NoKey  # list.append, for example
    if node.target is builtins.getattr:
        if len(node.args) == 2 and node.args[1] in _READABLE:
            return getattr
    elif node.op == "call_function" and is_pure(node.target):
        return node.target
    raise NoKey


def is_pure(function: Any) -> bool:
    """Whether a function is PyTorch's or Python's own, so that what it does to tensors follows from its arguments."""
    if isinstance(function, torch._ops.OpOverload):
        return function.namespace in ("aten", "prims")
    owner = getattr(function, "__self__", None)
    if not isinstance(function, types.FunctionType | types.BuiltinFunctionType) or isinstance(owner, type):
        return False  # a class as owner: `apply` of an autograd function of the user
    modules = [function.__module__ or ""]
    if isinstance(function, types.FunctionType):  # a decorator of PyTorch around a function of the user
        modules.append(function.__globals__.get("__name__", ""))
    return all(module.partition(".")[0] in _PURE_MODULES for module in modules)


def tensor_key(tensor: Tensor | Abstract, numbers: dict[Storage, int], storages: Storages) -> Hashable:
    """Return the key of a tensor. `numbers` numbers the storages in the order in which they are met.

    Raises:
        NoKey: its geometry does not describe it completely.
    """
    tensor_geometry, storage = geometry(tensor), storages.of(tensor)
    if tensor_geometry is None:
        raise NoKey
    number = numbers.setdefault(storage, len(numbers))
    key = tensor_geometry, number, storage.size, storage.own
    if isinstance(tensor, FakeTensor | Abstract):
        return key
    # Composite operators keep views of the fake tensor that stands for a real one.
    fake_storage = storages.fake_of(tensor)
    return *key, type(tensor), numbers.setdefault(fake_storage, len(numbers))
