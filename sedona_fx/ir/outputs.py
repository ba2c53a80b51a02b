"""What a model returns: its fields, the tensors in it, and which of them is the primary output."""

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

Step = str | int | None
"""Attribute, mapping key or index of a field; None: the output is a bare tensor."""
Key = Step | tuple[Step, ...]
"""Where the primary output is: a field, or a field of a field and so on, as a tuple of steps."""

Loss = Callable[[Any, Any], Tensor]
"""The task's loss: ``(output, target) -> scalar``."""

HEAD_OUTPUT = "head output"
"""Key of what a head gives in the local output of a block whose head is given fields of the output."""
_CONSTANTS = (type(None), bool, int, float, complex, str, slice, range, torch.dtype, torch.device)
_LEAVES = (Tensor, fx.Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)


def fields(output: Any) -> list[tuple[Step, Any]]:
    """Return the (key, value) pairs of a model's output; a bare tensor is one pair with the key None."""
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
    """Return the field of an output with the given key."""
    for step in key if isinstance(key, tuple) else (key,):
        output = output if step is None else dict(fields(output))[step]
    return output


def named(key: Key) -> Step:
    """Return a key as the user writes it: a path as ``"one2many.boxes"``."""
    return ".".join(map(str, key)) if isinstance(key, tuple) else key


def has_field(output: Any, key: Key) -> bool:
    """Whether an output has a field with the given key."""
    try:
        pick(output, key)
    except KeyError:
        return False
    return True


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a copy of a nested value with a function applied to every tensor.

    Unlike ``pytree.tree_map_only``, it also looks into dataclasses and mappings that are not registered with pytree.
    """

    if isinstance(value, Tensor):  # the usual case, in every block of every step
        return function(value)

    def mapped(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        result: Any
        if isinstance(item, MutableMapping):
            result = copy.copy(item)
            for key, inner in item.items():
                result[key] = map_tensors(function, inner)
            return result
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            result = copy.copy(item)
            for field in dataclasses.fields(item):
                object.__setattr__(result, field.name, map_tensors(function, getattr(item, field.name)))
            return result
        return item

    return pytree.tree_map(mapped, value)


def is_leaf(value: Any) -> bool:
    """Whether a graph computes a value: a tensor, or, while a forward pass is recorded, a proxy or symbolic size."""
    return isinstance(value, _LEAVES)


def is_container(value: Any) -> bool:
    """Whether a value has fields that a graph can fill in."""
    return isinstance(value, (Mapping, list, tuple)) or (
        dataclasses.is_dataclass(value) and not isinstance(value, (type, TensorSpec))
    )


def is_object(value: Any) -> bool:
    """Whether a graph can neither compute a value nor hold it: an object of some other class, such as a cache."""
    return not (is_leaf(value) or isinstance(value, _CONSTANTS) or is_container(value))


def leaves(output: Any) -> Iterator[Any]:
    """Yield the values in a model's output that a graph computes, in the order of the fields."""
    if is_leaf(output):
        yield output
    elif is_container(output):
        for _, value in fields(output):
            yield from leaves(value)


def without_objects(output: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a model's output with None in place of every object that a graph cannot give, and a list of these.

    Hugging Face's decoders, for example, return their cache of keys and values, an object, beside the logits. An object
    that is the whole output is kept.

    Returns:
        The output itself if it contains no such object, else a copy; and each object as its field and class, such as
        ``"past_key_values (DynamicCache)"``.
    """
    objects: list[str] = []

    def stripped(value: Any, where: str) -> Any:
        if where and is_object(value):
            objects.append(f"{where} ({type(value).__name__})")
            return None
        if not is_container(value) or is_leaf(value):
            return value
        count = len(objects)
        content = {key: stripped(item, f"{where}.{key}" if where else str(key)) for key, item in fields(value)}
        return _with_fields(value, content) if len(objects) > count else value

    return stripped(output, ""), tuple(objects)


def find_primary(output: Any, wanted: Key = None) -> Key:
    """Return the key of the primary output: `wanted`, else ``logits``, else the only or first float tensor.

    Fields of fields are looked at where no field is a float tensor itself.

    Args:
        output: what the model returns, tensors or :class:`TensorSpec` at its leaves.
        wanted: the user's ``output=``: an attribute, a key or an index, a negative one counts from the end; or a path
            of these, ``"one2many.boxes"``.

    Raises:
        OutputError: no float tensor is named `wanted`, or there is no float tensor at all.
    """
    found = list(_floats(output))
    if wanted is not None:
        meant = resolve_key(output, wanted)
        if meant in found:
            return meant
        names = [named(key) for key in found]
        raise OutputError(
            f"output={wanted!r} names no float tensor in what the model returns ({type(output).__name__}); "
            f"float tensors are {names or 'none'}."
        )
    if "logits" in found:
        return "logits"
    if found:
        return next((key for key in found if not isinstance(key, tuple)), found[0])
    raise OutputError(
        f"the model returns {type(output).__name__} with no float tensor that a loss could be about; name one with "
        "output=... (an attribute, a key or an index of what the model returns)."
    )


def split_local(local: Any) -> tuple[Any, Mapping[Step, Any]]:
    """Return what a head gives, and the fields of the output that it was given, of the local output of a block."""
    if isinstance(local, Mapping) and HEAD_OUTPUT in local:
        return local[HEAD_OUTPUT], {key: value for key, value in local.items() if key != HEAD_OUTPUT}
    return local, {}


def _floats(output: Any, where: tuple[Step, ...] = ()) -> Iterator[Key]:
    """Yield the keys of the float tensors in an output."""
    for step, value in fields(output):
        if _is_float(value):
            yield (*where, step) if where else step
        elif is_container(value):
            yield from _floats(value, (*where, step))


def resolve_key(output: Any, wanted: Key) -> Key:
    """Return the key of the field that the user means: an index (-1 is the last) is that field's key, names are kept.

    Args:
        output: what the model returns, tensors or :class:`TensorSpec` at its leaves.
        wanted: the user's ``output=``.
    """
    if isinstance(wanted, str) and "." in wanted and wanted not in dict(fields(output)):
        wanted = tuple(int(step) if step.lstrip("-").isdecimal() else step for step in wanted.split("."))
    if not isinstance(wanted, tuple):
        return _resolve_step(output, wanted)
    path = list[Step]()
    for step in wanted:
        path.append(_resolve_step(output, step) if is_container(output) else step)
        output = dict(fields(output)).get(path[-1])
    return tuple(path)


def _resolve_step(output: Any, wanted: Step) -> Step:
    keys = [key for key, _ in fields(output)]
    if wanted in keys or keys == [None] or isinstance(wanted, bool) or not isinstance(wanted, int):
        return wanted
    return keys[wanted] if -len(keys) <= wanted < len(keys) else wanted


def _with_fields(value: Any, content: Mapping[Any, Any]) -> Any:
    """Return a copy of a container with other values in its fields."""
    if isinstance(value, Mapping) and dataclasses.is_dataclass(value):
        return type(value)(**content)  # Hugging Face's outputs: a field that is None is not a key of the mapping
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        result.update(content)
        return result
    if isinstance(value, tuple):
        return type(value)(*content.values()) if hasattr(value, "_fields") else tuple(content.values())
    if isinstance(value, list):
        return list(content.values())
    result = copy.copy(value)
    for name, item in content.items():
        object.__setattr__(result, name, item)
    return result


def _is_float(value: Any) -> bool:
    return isinstance(value, (TensorSpec, Tensor)) and value.dtype.is_floating_point
