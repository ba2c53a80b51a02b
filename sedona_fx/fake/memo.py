"""What an operation does to tensors without numbers, remembered: a deep net repeats a few dozen operations.

An :class:`Effect` is found again under all that it can depend on: the operation, its plain arguments, the geometry of
its tensors, and which of them share memory. Whatever does not fit such a key (code of the user's, values that may hide
tensors) has none and runs every time.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from sedona_fx.fake.tensors import Abstract, Geometry, Storage, Storages, geometry

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_PURE = ("torch", "torchvision", "_operator", "operator", "builtins", "math")
_READABLE = frozenset({"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "T", "mT", "H", "mH"})
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


@dataclass(frozen=True)
class Effect:
    """What an operation did.

    Storages are numbers: first those of the call, as in :attr:`Call.storages`, then `fresh` ones, given by their sizes.

    Attributes:
        leaves: of the result: the position of a tensor given, (geometry, storage) of a new one, or a plain value.
        tree: the nesting of the result; None for a tensor alone.
        value: the result in words of the graph.
        fresh: bytes of the storages that the operation took, those that it kept for backward among them.
        saved: storages kept for backward, with their bytes.
        mutates: storages written to.
    """

    leaves: tuple[_Given | _New | _Value, ...]
    tree: pytree.TreeSpec | None
    value: Any
    fresh: tuple[int, ...]
    saved: tuple[tuple[int, int], ...]
    mutates: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class _Given:
    position: int


@dataclass(frozen=True)
class _New:
    geometry: Geometry
    storage: int


@dataclass(frozen=True)
class _Value:
    value: Any


Memo = dict[Hashable, Effect]
"""Effects by all that they depend on. One may serve all graphs of a model."""


@dataclass(frozen=True)
class Call:
    """An operation on given values: its key in a memo, its tensors, each once, and their storages, each once."""

    key: Hashable
    tensors: Sequence[Tensor | Abstract]
    storages: Sequence[Storage]


@dataclass(frozen=True)
class Run:
    """What was seen of a run, as in :class:`Effect`; ``known`` is the number of the last storage known before."""

    result: Any
    value: Any
    saved: Mapping[Storage, int]
    mutates: Iterable[Storage]
    flops: int
    known: int


def call_of(node: fx.Node, module: nn.Module | None, env: Mapping[fx.Node, Any], storages: Storages) -> Call | None:
    """Return what a node calls, or None where a key cannot say that.

    Args:
        node: a call.
        module: the one that the node calls.
        env: the values of the nodes before.
        storages: of this run of the graph.
    """
    reader = _Reader(env)
    try:
        operation = reader.module(module) if module is not None else _operation(node, env)
        arguments = reader.read((node.args, node.kwargs))
        numbers: dict[Storage, int] = {}
        words = tuple(_word(tensor, numbers, storages) for tensor in reader.tensors)
    except _NoKey:
        return None
    if not words:  # it may read or set the state of the interpreter
        return None
    return Call((operation, arguments, words, torch.is_grad_enabled()), reader.tensors, list(numbers))


def effect_of(call: Call, run: Run, storages: Storages) -> Effect | None:
    """Return what a run of a call did, or None where it cannot be told again."""
    numbers = {storage: number for number, storage in enumerate(call.storages)}
    given = {id(tensor.made if isinstance(tensor, Abstract) else tensor): k for k, tensor in enumerate(call.tensors)}
    dtypes = {storages.of(tensor): seen.dtype for tensor in call.tensors if (seen := geometry(tensor))}

    def number(storage: Storage) -> int:
        if storage not in numbers and storage.number <= run.known:
            raise _NoKey  # a tensor that the operation keeps between its calls
        return numbers.setdefault(storage, len(numbers))

    def leaf(value: Any) -> _Given | _New | _Value:
        if id(value) in given:
            return _Given(given[id(value)])
        if isinstance(value, Tensor):
            seen = geometry(value) if isinstance(value, FakeTensor) else None
            storage = storages.of(value)
            # Views of another type than their storage's first tensor could not be made.
            if seen is None or dtypes.setdefault(storage, seen.dtype) != seen.dtype:
                raise _NoKey
            return _New(seen, number(storage))
        if type(value) not in _PLAIN:
            raise _NoKey
        return _Value(value)

    try:
        if isinstance(run.result, Tensor):
            leaves, tree = [run.result], None
        else:
            leaves, tree = pytree.tree_flatten(run.result)
            if not _is_rigid(run.result):
                raise _NoKey
        told = tuple(map(leaf, leaves))
        saved = tuple((number(storage), size) for storage, size in run.saved.items())
        mutates = tuple(map(number, run.mutates))
    except _NoKey:
        return None
    fresh = tuple(storage.size for storage in list(numbers)[len(call.storages) :])
    return Effect(told, tree, run.value, fresh, saved, mutates, run.flops)


def replay(effect: Effect, call: Call, storages: Storages) -> tuple[Any, dict[Storage, int], list[Storage]]:
    """Return the result of a call without running it, what it keeps for backward and what it writes to."""
    memory = [*call.storages, *map(storages.fresh, effect.fresh)]

    def make(leaf: _Given | _New | _Value) -> Any:
        if isinstance(leaf, _Given):
            return call.tensors[leaf.position]
        if isinstance(leaf, _Value):
            return leaf.value
        return memory[leaf.storage].hold(leaf.geometry)

    leaves = [make(leaf) for leaf in effect.leaves]
    result = leaves[0] if effect.tree is None else pytree.tree_unflatten(leaves, effect.tree)
    return result, {memory[n]: size for n, size in effect.saved}, [memory[n] for n in effect.mutates]


class _NoKey(Exception):
    """Something that no key can hold."""


class _Reader:
    """Turns arguments into a key and collects the tensors in them, each once."""

    def __init__(self, env: Mapping[fx.Node, Any]) -> None:
        self.env = env
        self.tensors: list[Tensor | Abstract] = []
        self._positions: dict[int, int] = {}

    def read(self, value: Any) -> Hashable:
        """Return a word for a value: equal for equal values of one type, tensors by their positions."""
        kind = type(value)
        if kind is fx.Node:
            return self.read(self.env[value])
        if kind in _PLAIN:
            return kind, value  # 1 == 1.0 == True
        if isinstance(value, Tensor | Abstract):
            position = self._positions.setdefault(id(value), len(self.tensors))
            if position == len(self.tensors):
                self.tensors.append(value)
            return Tensor, position
        if isinstance(value, tuple | list):  # fx's own lists among them
            return kind, tuple(map(self.read, value))
        if isinstance(value, dict):
            return kind, tuple((self.read(name), self.read(item)) for name, item in value.items())
        if kind is slice:
            return kind, self.read((value.start, value.stop, value.step))
        raise _NoKey

    def module(self, module: nn.Module, moody: bool = False) -> Hashable:
        """Return a word for a module of PyTorch's own: its class, all that it holds, and those inside of it.

        The mode is left out where nobody reads it, so that train and eval graph share what they can; `moody`: the
        module around it reads modes.
        """
        kind = type(module)
        if not kind.__module__.startswith("torch.nn.modules."):
            raise _NoKey
        moody = moody or _reads_mode(kind)  # type: ignore[arg-type]
        left_out = _REGISTRIES if moody else _REGISTRIES | {"training"}
        words = [(name, self._attribute(value)) for name, value in vars(module).items() if name not in left_out]
        held = {**module._parameters, **module._buffers}
        inside = [(name, None if m is None else self.module(m, moody)) for name, m in module._modules.items()]
        return kind, tuple(words), self.read(held), tuple(inside)

    def _attribute(self, value: Any) -> Hashable:
        if isinstance(value, dict) and not value:  # no hooks
            return None
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and _is_pure(value):  # an activation
            return value
        before = len(self.tensors)
        word = self.read(value)
        if len(self.tensors) > before:  # a tensor that is neither parameter nor buffer may be replaced by the forward
            raise _NoKey
        return word


@functools.cache
def _reads_mode(kind: type) -> bool:
    """Whether any code of a class, or of those that it is derived from, names ``training``."""

    def names(code: types.CodeType) -> bool:
        inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        return "training" in code.co_names or any(map(names, inner))

    functions = [f for base in kind.__mro__ if base not in (nn.Module, object) for f in vars(base).values()]
    return any(names(f.__code__) for f in functions if isinstance(f, types.FunctionType))


def does_only_its_own(node: fx.Node) -> bool:
    """Whether a node reads no tensors but those it is given: it calls no code of the user's."""
    return node.op not in ("call_module", "call_function") or _is_pure(node.target)


def _operation(node: fx.Node, env: Mapping[fx.Node, Any]) -> Hashable:
    """Return what a node calls if it does nothing but what PyTorch says that it does."""
    if node.op == "call_method":
        if isinstance(node.args[0], fx.Node) and isinstance(env[node.args[0]], Tensor | Abstract):
            return str(node.target)
        raise _NoKey  # list.append
    if node.target is builtins.getattr:
        if len(node.args) == 2 and node.args[1] in _READABLE:
            return getattr
    elif node.op == "call_function" and _is_pure(node.target):
        return node.target
    raise _NoKey


def _is_pure(function: Any) -> bool:
    """Whether a function is PyTorch's or Python's own: what it does to tensors follows from its arguments."""
    if isinstance(function, torch._ops.OpOverload):
        return function.namespace in ("aten", "prims")
    owner = getattr(function, "__self__", None)
    if not isinstance(function, types.FunctionType | types.BuiltinFunctionType) or isinstance(owner, type):
        return False  # an owner: apply of an autograd function of the user's
    homes = [function.__module__ or ""]
    if isinstance(function, types.FunctionType):  # a decorator of PyTorch's around a function of the user's
        homes.append(function.__globals__.get("__name__", ""))
    return all(home.partition(".")[0] in _PURE for home in homes)


def _word(tensor: Tensor | Abstract, numbers: dict[Storage, int], storages: Storages) -> Hashable:
    """Return a word for a tensor; `numbers` counts the storages on the way."""
    seen, storage = geometry(tensor), storages.of(tensor)
    if seen is None:
        raise _NoKey
    number = numbers.setdefault(storage, len(numbers))
    if isinstance(tensor, FakeTensor | Abstract):
        return seen, number, storage.size, storage.own
    fake = storages.fake_of(tensor)  # what operators made of others keep in the place of a real tensor
    return seen, number, storage.size, storage.own, type(tensor), numbers.setdefault(fake, len(numbers))


def _is_rigid(value: Any) -> bool:
    """Whether a result is tuples and lists, however deep."""
    return (
        type(value) in _PLAIN
        or isinstance(value, Tensor)
        or (isinstance(value, tuple | list) and all(map(_is_rigid, value)))
    )
