"""Values inside of a plan, the record of the capture among them: for JSON, and checked where they come from a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError, did_you_mean

FrontEnd = Literal["symbolic", "export"]
_MOST_ELEMENTS = 2**32
"""An input of an example batch with more elements is taken for damage: it would be made as noise."""


@dataclass(frozen=True)
class FreeSize:
    """A size of an input that a captured graph leaves free, besides that of the batch.

    Attributes:
        name: of the argument.
        dim: its dimension.
        symbol: sizes of the same symbol are equal in every call.
        least, most: the sizes that it may have; None: any.
    """

    name: str
    dim: int
    symbol: str
    least: int
    most: int | None = None

    @property
    def text(self) -> str:
        """The sizes in words: ``"2 to 64"``."""
        return f"{self.least} to {self.most}" if self.most is not None else f"{self.least} or more"


@dataclass(frozen=True)
class Capture:
    """How the model's forward became a graph: what the code that runs the graph has to know about it.

    Attributes:
        front_end: ``"symbolic"`` (``torch.fx``) or ``"export"`` (``torch.export``, which may fix sizes of inputs).
        free_batch: whether the graph takes batches of any size.
        free_sizes: the other sizes of inputs that an exported graph leaves free; all others are fixed there. Symbolic
            graphs fix none.
        hosted: whether the code around the plan's `root` could not be captured and runs as Python.
        left_out: the fields of the model's output that the graph cannot give, each with its class, such as
            ``"past_key_values (DynamicCache)"``; they are None in the net's output.
    """

    front_end: FrontEnd = "symbolic"
    free_batch: bool = True
    hosted: bool = False
    left_out: tuple[str, ...] = ()
    free_sizes: tuple[FreeSize, ...] = ()

    @property
    def fixed_sizes(self) -> bool:
        """Whether inputs must have the sizes that the model was captured with, except for those that are free."""
        return self.front_end == "export" and not self.hosted


@dataclass(frozen=True)
class ExportOptions:
    """How ``torch.export`` was asked to capture a model; asked otherwise, it may give another program.

    Attributes:
        free_sizes: whether sizes of inputs other than the batch were to be left free where possible.
        tell_autocast: whether code that asks whether autocast is on was told that it is.
    """

    free_sizes: bool = True
    tell_autocast: bool = True


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


def read_capture(value: dict[str, Any], source: str) -> Capture:
    """Return the record of the capture from JSON values; entries that are missing have their defaults.

    Raises:
        PlanError: an entry is unknown, or of a wrong type.
    """
    entries = {f.name for f in dataclasses.fields(Capture)}
    for name in value:
        if name not in entries:
            near = did_you_mean(name, entries)
            raise PlanError(f"{source}: the field 'capture' has the unknown entry {name!r}{near}. Rename or remove it.")
    left_out = value.get("left_out", [])
    flags = [value.get(name, True) for name in ("free_batch", "hosted")]
    are_names = isinstance(left_out, list) and all(isinstance(name, str) for name in left_out)
    if not are_names or not all(isinstance(flag, bool) for flag in flags):
        raise PlanError(f"{source}: the field 'capture' should have two flags and a list of names: {value!r}.")
    free_sizes = value.get("free_sizes", [])
    if not isinstance(free_sizes, list):
        raise PlanError(f"{source}: the entry 'free_sizes' of the field 'capture' should be a list: {free_sizes!r}.")
    sizes = tuple(_read_size(size, source) for size in free_sizes)
    capture = Capture(**{**value, "left_out": tuple(left_out), "free_sizes": sizes})
    if capture.front_end not in ("symbolic", "export"):
        raise PlanError(f"{source}: the front end {capture.front_end!r} is neither 'symbolic' nor 'export'.")
    return capture


def _read_size(value: Any, source: str) -> FreeSize:
    names = [f.name for f in dataclasses.fields(FreeSize)]
    if not isinstance(value, dict) or sorted(value) != sorted(names):
        raise PlanError(f"{source}: a free size in the field 'capture' should have {', '.join(names)}: {value!r}.")
    texts, numbers = [value["name"], value["symbol"]], [value["dim"], value["least"]]
    numbers += [value["most"]] if value["most"] is not None else []
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise PlanError(f"{source}: a free size in the field 'capture' has entries of wrong types: {value!r}.")
    return FreeSize(**value)
