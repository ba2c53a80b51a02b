"""The plan: everything that was decided about a net (cuts, heads, devices) and how, as data and as JSON on disk.

The typed fields of a plan are state: whoever builds or runs a net reads them. The provenance is a record for people.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedona_fx.errors import PlanError, did_you_mean
from sedona_fx.files import json_digest, parse_json, replacing
from sedona_fx.plan_values import (
    Capture,
    check_seconds,
    check_spec,
    finite,
    inputs_from_json,
    inputs_to_json,
    read_capture,
)

FORMAT = 2
"""Version of the JSON. Version 1 kept `capture`, `seed` and `block_seconds` in the provenance; it is still read."""

_ADVICE = "Make the plan again with decouple(...) and plan.save(path)."


@dataclass(frozen=True)
class Plan:
    """The decision about a net, which can be saved, read, compared and applied again with ``decouple(plan=...)``.

    Attributes:
        cuts: names of the K-1 cut points in the order of the forward pass: a module path (the cut is after that module)
            or the site of an operation.
        heads: for each cut, the registered name of its head, or None for no head.
        devices: one device name per block. None: all blocks are on the model's device.
        output: attribute, key or index of the primary output, or a path of these with dots between; None if the model
            returns a bare tensor, or to find it by rule.
        root: module path of the part that was cut; empty for the whole model.
        model: name of the model's class, for messages.
        base_layers: names of the cut points that end base layers, except for the last base layer; searches choose among
            them.
        max_live: how many activations may cross at a cut that is not the user's own, as it was given or chosen; what
            ends base layers depends on it. None: not known (a plan from before it was noted).
        inputs: argument name -> ``{"shape": [...], "dtype": "float32"}`` for each tensor of the example batch, or the
            value of an argument without tensors.
        seed: seed of the search, of the heads' initial weights and of the blocks' random draws in training.
        loss: qualified name of the net's loss, ``"none"`` for a net without one. None: not known (a plan from before
            losses were named, or of no net yet).
        local_losses: for each block but the last the qualified name of its own objective, or None for the net's loss.
            None: all have the net's loss, or it is not known.
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
    max_live: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    loss: str | None = None
    local_losses: tuple[str | None, ...] | None = None
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
        if self.local_losses is not None and len(self.local_losses) != len(self.cuts):
            raise PlanError(
                f"a plan needs one local loss (or null) a cut: {len(self.cuts)} cuts, {len(self.local_losses)} losses."
            )
        object.__setattr__(self, "provenance", finite(self.provenance))

    @property
    def blocks(self) -> int:
        """Number of blocks, K."""
        return len(self.cuts) + 1

    def to_json(self) -> str:
        """Return the plan as JSON text in the standard form, without ``Infinity`` and ``NaN``."""
        data = dataclasses.asdict(self)
        data["inputs"] = inputs_to_json(data["inputs"])
        return json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> Plan:
        """Return the plan that :meth:`to_json` wrote.

        Args:
            text: the JSON text, of format 1 or 2.
            source: what the text is, for messages.

        Raises:
            PlanError: the text is not JSON (perhaps truncated), is of another format, lacks a field, has an unknown
                field or one of a wrong type, or is not what :meth:`save` wrote.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(
                f"{source} is not JSON: {error}. The file may be truncated; {_ADVICE[0].lower()}{_ADVICE[1:]}"
            ) from None
        if not isinstance(data, dict):
            raise PlanError(f"{source} holds {type(data).__name__}, not an object with the fields of a plan. {_ADVICE}")
        field_names = {f.name for f in dataclasses.fields(cls)}
        checksum = data.pop("checksum", None)
        digest = json_digest(data)
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
        plan = cls(**{name: _checked_field(name, value, source) for name, value in data.items()})
        if checksum not in (None, digest):
            raise PlanError(
                f"{source} is damaged: it has another checksum than when it was written. {_ADVICE} If you edited it by "
                'hand, remove its line "checksum".'
            )
        return plan

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
        data = json.loads(self.to_json())
        text = json.dumps({**data, "checksum": json_digest(data)}, indent=1, allow_nan=False) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


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

    if name in ("cuts", "heads", "base_layers", "devices", "local_losses"):
        if name in ("devices", "local_losses") and value is None:
            return None
        allowed = (str, type(None)) if name in ("heads", "local_losses") else (str,)
        if not isinstance(value, list) or not all(isinstance(item, allowed) for item in value):
            raise wrong("a list of names")
        return tuple(value)
    if name == "output":
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise wrong("a name, an index or null")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise PlanError(f"{source}: the field 'output' has {value.bit_length()} bits; no output has that index.")
    elif name in ("model", "root"):
        if not isinstance(value, str):
            raise wrong("a name")
    elif name == "max_live":
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise wrong("a number of activations or null")
    elif name == "loss":
        if not isinstance(value, (str, type(None))):
            raise wrong("a name or null")
    elif name == "seed":
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
        if not -(2**63) <= value < 2**64:
            raise PlanError(f"{source}: the field 'seed' has {value.bit_length()} bits; seeds have 64 at most.")
    elif name in ("capture", "block_seconds") and value is None:
        return None
    elif not isinstance(value, dict):
        raise wrong("an object")
    elif name == "capture":
        return read_capture(value, source)
    elif name == "block_seconds":
        if not value.keys() >= {"places", "stretches", "heads"}:
            raise PlanError(f"{source}: the field 'block_seconds' should have places, stretches and heads.")
        check_seconds(value, f"{source}: the field 'block_seconds'")
    elif name == "inputs":
        for argument, spec in value.items():
            check_spec(f"{source}: the input {argument!r}", spec)
        return inputs_from_json(value)
    return value
