"""The plan: everything that was decided about a net (cuts, heads, devices) and how, as data and as JSON on disk.

The typed fields of a plan are state: whoever builds or runs a net reads them. The provenance is a record for people.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError, did_you_mean
from sedona_fx.files import replacing

FORMAT = 2
"""Version of the JSON. Version 1 kept `capture`, `seed` and `block_seconds` in the provenance; it is still read."""

_ADVICE = "Make the plan again with decouple(...) and plan.save(path)."

FrontEnd = Literal["symbolic", "export"]


@dataclass(frozen=True)
class Capture:
    """How the model's forward became a graph: what the code that runs the graph has to know about it.

    Attributes:
        front_end: ``"symbolic"`` (``torch.fx``) or ``"export"`` (``torch.export``, which fixes all sizes except that of
            the batch).
        free_batch: whether the graph takes batches of any size.
        hosted: whether the code around the plan's `root` could not be captured and runs as Python.
        left_out: the fields of the model's output that the graph cannot give, each with its class, such as
            ``"past_key_values (DynamicCache)"``; they are None in the net's output.
    """

    front_end: FrontEnd = "symbolic"
    free_batch: bool = True
    hosted: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def fixed_sizes(self) -> bool:
        """Whether inputs must have the sizes that the model was captured with, except for a free batch."""
        return self.front_end == "export" and not self.hosted


@dataclass(frozen=True)
class Plan:
    """The decision about a net, which can be saved, read, compared and applied again with ``decouple(plan=...)``.

    Attributes:
        cuts: names of the K-1 cut points in the order of the forward pass: a module path (the cut is after that module)
            or the site of an operation.
        heads: for each cut, the registered name of its head, or None for no head.
        devices: one device name per block. None: all blocks are on the model's device.
        output: attribute, key or index of the primary output; None if the model returns a bare tensor, or to find it by
            rule.
        root: module path of the part that was cut; empty for the whole model.
        model: name of the model's class, for messages.
        base_layers: names of the cut points that end base layers, except for the last base layer; searches choose among
            them.
        inputs: argument name -> ``{"shape": [...], "dtype": "float32"}`` for each tensor of the example batch, or the
            value of an argument without tensors.
        seed: seed of the search, of the heads' initial weights and of the blocks' random draws in training.
        capture: how the model became a graph. Replaced whenever the plan is applied; None: not applied yet.
        block_seconds: seconds of stretches and heads as measured for the budget, so that the same budget gives the same
            plan again; None: not measured.
        provenance: how the decision was made, for people: search, settings, trajectory, costs, versions. Nothing reads
            it to decide anything. It holds None in place of a number that is not finite (the loss of a plan that
            diverged), since JSON has no such numbers.

    Raises:
        PlanError: the numbers of cuts, heads and devices do not fit each other, or a cut is named twice.
    """

    cuts: tuple[str, ...] = ()
    heads: tuple[str | None, ...] = ()
    devices: tuple[str, ...] | None = None
    output: str | int | None = None
    root: str = ""
    model: str = ""
    base_layers: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    capture: Capture | None = None
    block_seconds: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.cuts):
            raise PlanError(f"a plan needs one head (or null) a cut: {len(self.cuts)} cuts, {len(self.heads)} heads.")
        if len(set(self.cuts)) != len(self.cuts):
            raise PlanError(f"a plan names a cut twice: {list(self.cuts)}. Leave one out, with its head.")
        if self.devices is not None and len(self.devices) != self.blocks:
            raise PlanError(f"a plan needs one device a block: {self.blocks} blocks, {len(self.devices)} devices.")
        object.__setattr__(self, "provenance", _finite(self.provenance))

    @property
    def blocks(self) -> int:
        """Number of blocks, K."""
        return len(self.cuts) + 1

    def to_json(self) -> str:
        """Return the plan as JSON text in the standard form, without ``Infinity`` and ``NaN``."""
        data = dataclasses.asdict(self)
        data["inputs"] = _inputs_to_json(data["inputs"])
        return json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Args:
            text: the JSON text, of format 1 or 2.
            source: what the text is, for messages.

        Raises:
            PlanError: the text is not JSON (perhaps truncated), is of another format, lacks a field, or has an unknown
                field or one of a wrong type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{source} is not JSON: {error}. The file may be truncated; {_ADVICE[0].lower()}{_ADVICE[1:]}"
            ) from None
        if not isinstance(data, dict):
            raise PlanError(f"{source} holds {type(data).__name__}, not an object with the fields of a plan. {_ADVICE}")
        field_names = {f.name for f in dataclasses.fields(cls)}
        version = data.pop("format", None)
        if version not in (1, FORMAT):
            raise PlanError(
                f'{source} has no "format": {FORMAT}; it was not written by this version of sedona_fx. {_ADVICE}'
            )
        if version == 1:
            _upgrade_format_1(data, source)
        for name in data:
            if name not in field_names:
                near = did_you_mean(name, field_names)
                raise PlanError(f"{source} has the unknown field {name!r}{near}. Rename or remove it.")
        for name in ("cuts", "heads"):
            if name not in data:
                raise PlanError(f"{source} lacks the field {name!r}. {_ADVICE}")
        return cls(**{name: _checked_field(name, value, source) for name, value in data.items()})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan in a file that :meth:`save` wrote.

        Raises:
            PlanError: the file cannot be read, or does not hold a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"cannot read the plan {str(path)!r}: {error}. Give the path of a file that plan.save(path) wrote."
            ) from None
        return cls.from_json(text, f"the plan {str(path)!r}")

    def save(self, path: str | Path) -> None:
        """Write the plan to a file. An existing file is replaced as a whole, or left as it is if writing fails."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


def _finite(value: Any) -> Any:
    """Return a nested value with None in place of every number that is not finite; the same object if all are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        changed = {key: _finite(item) for key, item in value.items()}
        return value if all(changed[key] is item for key, item in value.items()) else changed
    if isinstance(value, (list, tuple)):
        items = [_finite(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def _inputs_to_json(inputs: dict[str, Any]) -> Any:
    """Return inputs as values of JSON. An argument that is infinite is kept, as ``{"float": "inf"}``: nets need it."""

    def encoded(value: Any) -> Any:
        return {"float": repr(float(value))} if isinstance(value, float) and not math.isfinite(value) else value

    return pytree.tree_map(encoded, inputs)


def _inputs_from_json(inputs: dict[str, Any]) -> Any:
    """Return the inputs that :func:`_inputs_to_json` was given."""

    def is_encoded(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan")

    return pytree.tree_map(lambda v: float(v["float"]) if is_encoded(v) else v, inputs, is_leaf=is_encoded)


def _upgrade_format_1(data: dict[str, Any], source: str) -> None:
    """Move the entries of the provenance that have fields of their own since format 2 into these fields, in place."""
    record = data.get("provenance")
    if not isinstance(record, dict):
        return  # missing, which is allowed, or refused later
    data["seed"] = _checked_field("seed", record.pop("seed", 0), f"{source}, in its provenance")
    if "front_end" in record:
        data["capture"] = {
            "front_end": record.pop("front_end"),
            "free_batch": record.pop("free_batch", True),
            "hosted": record.pop("host", None) is not None,
            "left_out": record.pop("left_out", []),
        }
    budget = record.get("budget")
    if isinstance(budget, dict) and "measured" in budget:
        data["block_seconds"] = budget.pop("measured")


def _checked_field(name: str, value: Any, source: str) -> Any:
    """Return the value of a field as :class:`Plan` has it, or raise :class:`PlanError` if its type is wrong."""

    def wrong(expected: str) -> PlanError:
        return PlanError(f"{source}: the field {name!r} should be {expected}, not {type(value).__name__}.")

    if name in ("cuts", "heads", "base_layers", "devices"):
        if name == "devices" and value is None:
            return None
        allowed = (str, type(None)) if name == "heads" else (str,)
        if not isinstance(value, list) or not all(isinstance(item, allowed) for item in value):
            raise wrong("a list of names")
        return tuple(value)
    if name == "output":
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise wrong("a name, an index or null")
    elif name in ("model", "root"):
        if not isinstance(value, str):
            raise wrong("a name")
    elif name == "seed":
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
    elif name in ("capture", "block_seconds") and value is None:
        return None
    elif not isinstance(value, dict):
        raise wrong("an object")
    elif name == "capture":
        return _read_capture(value, source)
    elif name == "block_seconds":
        if not value.keys() >= {"places", "stretches", "heads"}:
            raise PlanError(f"{source}: the field 'block_seconds' should have places, stretches and heads.")
    elif name == "inputs":
        for argument, spec in value.items():
            _check_spec(f"{source}: the input {argument!r}", spec)
        return _inputs_from_json(value)
    return value


def _read_capture(value: dict[str, Any], source: str) -> Capture:
    """Return the record of the capture; entries that are missing have their defaults."""
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
    capture = Capture(**{**value, "left_out": tuple(left_out)})
    if capture.front_end not in ("symbolic", "export"):
        raise PlanError(f"{source}: the front end {capture.front_end!r} is neither 'symbolic' nor 'export'.")
    return capture


def _check_spec(where: str, spec: Any) -> None:
    """Check the description of an input: shape and dtype of a tensor, or plain values, nested as the input was.

    Raises:
        PlanError: a shape is not a list of sizes, or a dtype is not one of PyTorch's.
    """
    if isinstance(spec, list):
        for item in spec:
            _check_spec(where, item)
    elif isinstance(spec, dict) and spec.keys() == {"shape", "dtype"}:
        shape, dtype = spec["shape"], spec["dtype"]
        if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise PlanError(f"{where} has the shape {shape!r}, which should be a list of whole numbers.")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise PlanError(f"{where} has the dtype {dtype!r}, which torch does not know. Give one such as 'float32'.")
    elif isinstance(spec, dict):
        for item in spec.values():
            _check_spec(where, item)
