"""Values inside of a plan: encoded for JSON, and checked where they come from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError

_MOST_ELEMENTS = 2**32
"""An input of an example batch with more elements is taken for damage: it would be made as noise."""


def finite(value: Any) -> Any:
    """Return a nested value with None in place of every number that is not finite; the same object if all are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        changed = {key: finite(item) for key, item in value.items()}
        return value if all(changed[key] is item for key, item in value.items()) else changed
    if isinstance(value, (list, tuple)):
        items = [finite(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def inputs_to_json(inputs: dict[str, Any]) -> Any:
    """Return inputs as values of JSON. An argument that is infinite is kept, as ``{"float": "inf"}``: nets need it."""

    def encoded(value: Any) -> Any:
        return {"float": repr(float(value))} if isinstance(value, float) and not math.isfinite(value) else value

    return pytree.tree_map(encoded, inputs)


def inputs_from_json(inputs: dict[str, Any]) -> Any:
    """Return the inputs that :func:`inputs_to_json` was given."""

    def is_encoded(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan")

    return pytree.tree_map(lambda v: float(v["float"]) if is_encoded(v) else v, inputs, is_leaf=is_encoded)


def check_seconds(value: Mapping[str, Any], where: str) -> None:
    """Check that measured seconds are lists and objects of names and of finite numbers of 0 or more."""
    places, stretches, heads = value["places"], value["stretches"], value["heads"]
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        raise PlanError(f"{where} should have the names of places as a list.")
    if not isinstance(heads, dict) or not all(isinstance(head, dict) for head in heads.values()):
        raise PlanError(f"{where} should have an object of heads for every place.")
    if not isinstance(stretches, list):
        raise PlanError(f"{where} should have the seconds of stretches as a list.")
    for seconds in (*stretches, *(number for head in heads.values() for number in head.values())):
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e18:
            raise PlanError(f"{where} has {str(seconds)[:50]!r} where seconds should be.")


def check_spec(where: str, spec: Any) -> None:
    """Check the description of an input: shape and dtype of a tensor, or plain values, nested as the input was.

    Raises:
        PlanError: a shape is not a list of sizes, or a dtype is not one of PyTorch's.
    """
    if isinstance(spec, list):
        for item in spec:
            check_spec(where, item)
    elif isinstance(spec, dict) and spec.keys() == {"shape", "dtype"}:
        shape, dtype = spec["shape"], spec["dtype"]
        if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise PlanError(f"{where} has the shape {shape!r}, which should be a list of whole numbers.")
        if math.prod(shape) > _MOST_ELEMENTS or any(extent > _MOST_ELEMENTS for extent in shape):
            raise PlanError(f"{where} has a shape of {len(shape)} sizes that no tensor has: {str(shape)[:100]}.")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise PlanError(f"{where} has the dtype {dtype!r}, which torch does not know. Give one such as 'float32'.")
    elif isinstance(spec, dict):
        for item in spec.values():
            check_spec(where, item)
