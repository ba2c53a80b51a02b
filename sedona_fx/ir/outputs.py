"""The primary output: where it is in what the model returns, and how a head's output takes its place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sedona_fx.errors import OutputError
from sedona_fx.ir.graph import TensorSpec

Key = str | int | None
"""Attribute, mapping key or index of the primary output; None where the model returns a bare tensor."""


def fields(output: Any) -> list[tuple[Key, Any]]:
    """Return the (key, value) pairs of what a model returns; a bare tensor is one pair with the key None."""
    if isinstance(output, Mapping):
        return list(output.items())
    if hasattr(output, "_fields"):
        return [(name, getattr(output, name)) for name in output._fields]
    if dataclasses.is_dataclass(output) and not isinstance(output, TensorSpec):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return list(enumerate(output))
    return [(None, output)]


def pick(output: Any, key: Key) -> Any:
    """Return the field of an output that a key names."""
    return output if key is None else dict(fields(output))[key]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a copy of a nested value with a function applied to every tensor.

    As ``pytree.tree_map_only``, which does not look into dataclasses and mappings that are not registered with it.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        same: Any
        if isinstance(item, MutableMapping):
            same = copy.copy(item)
            for key, inner in item.items():
                same[key] = map_tensors(function, inner)
            return same
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            same = copy.copy(item)
            for field in dataclasses.fields(item):
                object.__setattr__(same, field.name, map_tensors(function, getattr(item, field.name)))
            return same
        return item

    return pytree.tree_map(leaf, value)


_CONSTANTS = (type(None), bool, int, float, complex, str, slice, range, torch.dtype, torch.device)
_LEAVES = (Tensor, fx.Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_leaf(value: Any) -> bool:
    """Whether a graph computes a value: a tensor, or what stands for one, or a size, while a forward is recorded."""
    return isinstance(value, _LEAVES)


def is_container(value: Any) -> bool:
    """Whether a value has fields that a graph can fill."""
    return isinstance(value, (Mapping, list, tuple)) or (
        dataclasses.is_dataclass(value) and not isinstance(value, (type, TensorSpec))
    )


def is_object(value: Any) -> bool:
    """Whether a graph can neither compute nor hold a value, as it is an object of somebody's own class (a cache)."""
    return not (is_leaf(value) or isinstance(value, _CONSTANTS) or is_container(value))


def leaves(output: Any) -> Iterator[Any]:
    """Yield what a graph computes of a model's output, in the order of its fields."""
    if is_leaf(output):
        yield output
    elif is_container(output):
        for _, value in fields(output):
            yield from leaves(value)


def without_objects(output: Any) -> tuple[Any, tuple[str, ...]]:
    """Return what a graph can give of a model's output, None in the place of each object, and which these are.

    Hugging Face's decoders return their cache of keys and values, an object, beside the logits. An object that is the
    whole output stays.

    Returns:
        The output itself if there are none in it, else a copy; and the objects by field and class, as
        ``"past_key_values (DynamicCache)"``.
    """
    found: list[str] = []

    def copied(value: Any, where: str) -> Any:
        if where and is_object(value):
            found.append(f"{where} ({type(value).__name__})")
            return None
        if not is_container(value) or is_leaf(value):
            return value
        count = len(found)
        inner = {key: copied(item, f"{where}.{key}" if where else str(key)) for key, item in fields(value)}
        return _with_fields(value, inner) if len(found) > count else value

    return copied(output, ""), tuple(found)


def _with_fields(value: Any, content: Mapping[Any, Any]) -> Any:
    """Return a copy of a container with other values in its fields."""
    if isinstance(value, Mapping) and dataclasses.is_dataclass(value):
        return type(value)(**content)  # Hugging Face's: a field that is None is no key of the mapping
    if isinstance(value, MutableMapping):
        same = copy.copy(value)
        same.update(content)
        return same
    if isinstance(value, tuple):
        return type(value)(*content.values()) if hasattr(value, "_fields") else tuple(content.values())
    if isinstance(value, list):
        return list(content.values())
    same = copy.copy(value)
    for name, item in content.items():
        object.__setattr__(same, name, item)
    return same


def _is_float(value: Any) -> bool:
    return isinstance(value, (TensorSpec, Tensor)) and value.dtype.is_floating_point


def find_primary(output: Any, wanted: Key = None) -> Key:
    """Return the key of the primary output: `wanted`, else ``logits``, else the only or first float tensor.

    Args:
        output: what the model returns, tensors or :class:`TensorSpec` at its leaves.
        wanted: the user's ``output=``: an attribute, a key or an index.

    Raises:
        OutputError: nothing of that name, or no float tensor at all.
    """
    found = fields(output)
    floats = [key for key, value in found if _is_float(value)]
    if wanted is not None:
        if wanted in floats:
            return wanted
        raise OutputError(
            f"output={wanted!r} names no float tensor in what the model returns ({type(output).__name__}); "
            f"float tensors are {floats or 'none'}."
        )
    if "logits" in floats:
        return "logits"
    if floats:
        return floats[0]
    raise OutputError(
        f"the model returns {type(output).__name__} with no float tensor that a loss could be about; name one with "
        "output=... (an attribute, a key or an index of what the model returns)."
    )


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """How the loss sees outputs: which field is primary, and the model's own type around it.

    ``auxiliary`` are the fields that exist only in training (GoogLeNet's two classifiers): where the loss gets the bare
    tensor, their losses are added with ``aux_weight``.
    """

    key: Key
    kind: type | None
    names: tuple[Key, ...]
    auxiliary: tuple[Key, ...] = ()
    aux_weight: float = 0.3

    @classmethod
    def of(cls, output: Any, key: Key, auxiliary: tuple[Key, ...] = ()) -> OutputFormat:
        """Describe an output (tensors or specs at its leaves) whose primary field is `key`."""
        kind = None if key is None else type(output)
        return cls(key, kind, tuple(k for k, _ in fields(output)), auxiliary)

    @property
    def bare(self) -> bool:
        """Whether the loss gets the tensor itself (a bare tensor or a namedtuple) and not the model's output type."""
        return self.kind is None or hasattr(self.kind, "_fields")

    def wrap(self, primary: Tensor) -> Any:
        """Put a head's output into the model's own output type, the other fields None."""
        if self.bare:
            return primary
        values: dict[Any, Any] = {name: primary if name == self.key else None for name in self.names}
        kind: Any = self.kind
        is_dataclass = dataclasses.is_dataclass(kind)
        if issubclass(kind, (list, tuple)):
            return kind(values.values())
        if is_dataclass:
            try:
                return kind(**values)
            except Exception:  # its __init__ demands what a head does not have, or does not take every field
                made: Any = object.__new__(kind)
                for name, value in values.items():
                    object.__setattr__(made, name, value)
                return made
        return kind(**values) if all(isinstance(name, str) for name in values) else kind(values)

    def head_loss(self, loss: Callable[[Any, Any], Tensor], head_output: Tensor, target: Any) -> Tensor:
        """Return the local loss of a head."""
        return loss(self.wrap(head_output), target)

    def final_loss(self, loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """Return the loss on the model's own output, auxiliary training outputs included.

        For a bare tensor or a namedtuple: ``loss(primary) + aux_weight * sum(loss(auxiliary))``, in the order of the
        fields from the last to the first (aux2 before aux1 in GoogLeNet's tuple stands aux2 first).
        """
        if not self.bare or isinstance(output, Tensor):
            return loss(output, target)
        total = loss(pick(output, self.key), target)
        for name in self.auxiliary:
            value = pick(output, name)
            if value is not None:
                total = total + self.aux_weight * loss(value, target)
        return total


Loss = Callable[[Any, Any], Tensor]
