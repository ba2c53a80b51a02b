"""A memo of what operations do to fake tensors, since a deep net repeats a few dozen operations.

An :class:`Effect` is stored under everything that it can depend on: the operation, its plain arguments, the geometry of
its tensors, and which of them share memory (:mod:`sedona_fx.fake.key`). An operation that no such key describes is run
every time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from sedona_fx.fake.key import PLAIN_TYPES, KeyReader, NoKey, is_pure, operation_key, tensor_key
from sedona_fx.fake.meter import Work
from sedona_fx.fake.tensors import Abstract, Geometry, Storage, Storages, geometry


@dataclass(frozen=True)
class Effect:
    """What an operation did.

    Storages are given by numbers: first those of the call, in the order of :attr:`Call.storages`, then new ones.

    Attributes:
        leaves: of the result: the position of an argument, (geometry, storage) of a new tensor, or a plain value.
        tree: the nesting of the result; None for a single tensor.
        value: the result as the graph records it, with a ``TensorSpec`` for each tensor.
        fresh: sizes in bytes of the storages that the operation allocated, including those kept for backward.
        saved: storages kept for backward, each with its size in bytes.
        mutates: storages written to.
        work: what its operators did.
    """

    leaves: tuple[_Argument | _New | _Value, ...]
    tree: pytree.TreeSpec | None
    value: Any
    fresh: tuple[int, ...]
    saved: tuple[tuple[int, int], ...]
    mutates: tuple[int, ...]
    work: Work


@dataclass(frozen=True)
class _Argument:
    position: int


@dataclass(frozen=True)
class _New:
    geometry: Geometry
    storage: int


@dataclass(frozen=True)
class _Value:
    value: Any


Memo = dict[Hashable, Effect]
"""Effects by the key of the call. One memo can serve all graphs of a model."""


@dataclass(frozen=True)
class Call:
    """An operation with its arguments.

    Attributes:
        key: of the call in a memo.
        tensors: the tensors among the arguments, each once.
        storages: the storages of these tensors, each once.
    """

    key: Hashable
    tensors: Sequence[Tensor | Abstract]
    storages: Sequence[Storage]


@dataclass(frozen=True)
class Run:
    """What was observed while an operation ran; the fields are those of :class:`Effect`.

    Attributes:
        result: what the operation returned.
        known: number of the last storage that existed before the operation ran.
    """

    result: Any
    value: Any
    saved: Mapping[Storage, int]
    mutates: Iterable[Storage]
    work: Work
    known: int


def call_of(node: fx.Node, module: nn.Module | None, env: Mapping[fx.Node, Any], storages: Storages) -> Call | None:
    """Return what a node calls, or None if no key describes it.

    Args:
        node: a call of a function, method or module.
        module: the module that the node calls, if it calls one.
        env: the values of the nodes before.
        storages: of this run of the graph.
    """
    reader = KeyReader(env)
    try:
        operation = reader.module(module) if module is not None else operation_key(node, env)
        arguments = reader.value((node.args, node.kwargs))
        numbers: dict[Storage, int] = {}
        tensors = tuple(tensor_key(tensor, numbers, storages) for tensor in reader.tensors)
    except NoKey:
        return None
    if not tensors:  # it may read or set a state of the interpreter
        return None
    return Call((operation, arguments, tensors, torch.is_grad_enabled()), reader.tensors, list(numbers))


def effect_of(call: Call, run: Run, storages: Storages) -> Effect | None:
    """Return the effect of a call from a run of it, or None if it cannot be replayed."""
    numbers = {storage: number for number, storage in enumerate(call.storages)}
    positions = {
        id(tensor.made if isinstance(tensor, Abstract) else tensor): k for k, tensor in enumerate(call.tensors)
    }
    geometries = [(tensor, geometry(tensor)) for tensor in call.tensors]
    dtypes = {storages.of(tensor): seen.dtype for tensor, seen in geometries if seen is not None}

    def number(storage: Storage) -> int:
        if storage not in numbers and storage.number <= run.known:
            raise NoKey  # of a tensor that the operation keeps between its calls
        return numbers.setdefault(storage, len(numbers))

    def describe_leaf(value: Any) -> _Argument | _New | _Value:
        if id(value) in positions:
            return _Argument(positions[id(value)])
        if isinstance(value, Tensor):
            new_geometry = geometry(value) if isinstance(value, FakeTensor) else None
            storage = storages.of(value)
            # A view could not be made if its dtype is not that of the first tensor on the storage.
            if new_geometry is None or dtypes.setdefault(storage, new_geometry.dtype) != new_geometry.dtype:
                raise NoKey
            return _New(new_geometry, number(storage))
        if type(value) not in PLAIN_TYPES:
            raise NoKey
        return _Value(value)

    try:
        if isinstance(run.result, Tensor):
            leaves, tree = [run.result], None
        else:
            leaves, tree = pytree.tree_flatten(run.result)
            if not _is_rigid(run.result):
                raise NoKey
        # Storages are numbered as they are met: first those of the result, then those kept, then those written to.
        described = tuple(map(describe_leaf, leaves))
        saved = tuple((number(storage), size) for storage, size in run.saved.items())
        mutates = tuple(map(number, run.mutates))
    except NoKey:
        return None
    return Effect(
        leaves=described,
        tree=tree,
        value=run.value,
        fresh=tuple(storage.size for storage in list(numbers)[len(call.storages) :]),
        saved=saved,
        mutates=mutates,
        work=run.work,
    )


def replay(effect: Effect, call: Call, storages: Storages) -> tuple[Any, dict[Storage, int], list[Storage]]:
    """Return what a call does according to a remembered effect, without running it.

    Args:
        effect: stored under the key of `call`.
        call: the call.
        storages: of this run of the graph, to which the new storages are added.

    Returns:
        The result, with new tensors abstract; the storages kept for backward with their bytes; those written to.
    """
    all_storages = [*call.storages, *map(storages.fresh, effect.fresh)]

    def make(leaf: _Argument | _New | _Value) -> Any:
        if isinstance(leaf, _Argument):
            return call.tensors[leaf.position]
        if isinstance(leaf, _Value):
            return leaf.value
        return all_storages[leaf.storage].hold(leaf.geometry)

    leaves = [make(leaf) for leaf in effect.leaves]
    result = leaves[0] if effect.tree is None else pytree.tree_unflatten(leaves, effect.tree)
    saved = {all_storages[number]: size for number, size in effect.saved}
    return result, saved, [all_storages[number] for number in effect.mutates]


def does_only_its_own(node: fx.Node) -> bool:
    """Whether a node reads no tensors but its arguments, since it calls no code of the user."""
    return node.op not in ("call_module", "call_function") or is_pure(node.target)


def _is_rigid(value: Any) -> bool:
    """Whether a result consists of tensors and plain values in tuples and lists, however deep."""
    return (
        type(value) in PLAIN_TYPES
        or isinstance(value, Tensor)
        or (isinstance(value, tuple | list) and all(map(_is_rigid, value)))
    )
