"""Everything that was decided about a net: cuts, heads, devices, and where the decision came from. JSON on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError, did_you_mean
from sedona_fx.files import replacing

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A decision that can be saved, read, compared and applied again.

    Attributes:
        cuts: names of the K-1 cut points, in order: a module path (the cut stands behind it) or an operation's site.
        heads: for each cut, the registered name of its head, or None for no head.
        devices: one device a block, or None.
        output: key of the primary output (attribute, key or index), or None for a bare tensor.
        root: module path of the part that was cut; empty: the whole model.
        model: name of the model's class, for messages.
        base_layers: the cut points among which was chosen.
        inputs: argument name -> ``{"shape": [...], "dtype": "float32"}`` of the example batch.
        provenance: how the decision was made: search, seed, settings, trajectory, costs, front end. In the place of a
            number that is not finite (the loss of a plan that diverged) it holds None, as JSON has no such numbers.
    """

    cuts: tuple[str, ...] = ()
    heads: tuple[str | None, ...] = ()
    devices: tuple[str, ...] | None = None
    output: str | int | None = None
    root: str = ""
    model: str = ""
    base_layers: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.cuts):
            raise PlanError(f"a plan needs one head (or null) a cut: {len(self.cuts)} cuts, {len(self.heads)} heads.")
        if len(set(self.cuts)) != len(self.cuts):
            raise PlanError(f"a plan names a cut twice: {list(self.cuts)}.")
        if self.devices is not None and len(self.devices) != self.blocks:
            raise PlanError(f"a plan needs one device a block: {self.blocks} blocks, {len(self.devices)} devices.")
        object.__setattr__(self, "provenance", _finite(self.provenance))

    @property
    def blocks(self) -> int:
        """Number of blocks, K."""
        return len(self.cuts) + 1

    def to_json(self) -> str:
        """Return the plan as JSON text, which any reader of JSON takes."""
        data = dataclasses.asdict(self)
        data["inputs"] = _written(data["inputs"])
        return json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> Plan:
        """Read a plan from JSON text.

        Raises:
            PlanError: not JSON (truncated, say), unknown or missing fields, wrong types, another format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{source} is not JSON: {error}. The file may be truncated; make the plan again with decouple(...) "
                "and plan.save(path)."
            ) from None
        if not isinstance(data, dict):
            raise PlanError(f"{source} holds {type(data).__name__}, not an object with the fields of a plan.")
        known = {f.name for f in dataclasses.fields(cls)}
        if data.pop("format", None) != FORMAT:
            raise PlanError(f'{source} has no "format": {FORMAT}; it was not written by this version of sedona_fx.')
        for name in data:
            if name not in known:
                raise PlanError(f"{source} has the unknown field {name!r}{did_you_mean(name, known)}.")
        for name in ("cuts", "heads"):
            if name not in data:
                raise PlanError(f"{source} lacks the field {name!r}.")
        return cls(**{name: _checked(name, value, source) for name, value in data.items()})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}.") from None
        return cls.from_json(text, f"the plan {str(path)!r}")

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, replacing it whole."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def transfer(
        self,
        model: nn.Module,
        data: Any = None,
        by: Literal["path", "fraction"] | None = None,
        leaf_modules: Collection[str] = (),
    ) -> Plan:
        """Return the plan for another net: for a wider one, cuts at the same paths; for a deeper one, at the same
        fractions of it.

        Heads keep their names, devices their order. ``provenance["transfer"]`` says what became of every cut.

        Args:
            model: the other net. It is not touched.
            data: one (inputs, target) pair or an iterable of such; None: noise in the shapes of this plan's inputs.
            by: ``"path"``: cut behind the same module paths. ``"fraction"``: a cut behind base layer i of B (from 1)
                goes where the other net's base layer j of C has j/C nearest to i/B; of two as near the earlier. Where
                two cuts want the same layer, the sum of the distances decides, then the earlier cuts. None: by path if
                both have as many base layers and all paths are legal cuts, else by fraction.
            leaf_modules: module paths that are kept whole while tracing.

        Raises:
            PlanError: the nets do not correspond: paths that are missing, or more cuts than base layers.
            HeadError: a head does not fit at its new place.
            DataError: the model does not take the inputs.
        """
        from sedona_fx.recipes.transfer import transfer  # what tools do with a plan is built on plans

        return transfer(self, model, data, by, leaf_modules)

    @classmethod
    def from_released(
        cls,
        alpha: Sequence[Sequence[float]] | Tensor,
        beta: Sequence[Sequence[float] | Tensor] | Tensor,
        model: nn.Module,
        blocks: int = 4,
        data: Any = None,
        heads: str | None = None,
    ) -> Plan:
        """Read a decision that SEDONA's authors released: their variables, decoded for one of their nets.

        Args:
            alpha: (B-1, 2) logits: isolate, let through.
            beta: (B-1, 4) logits of the heads of depth 1 to 4.
            model: a net of :mod:`sedona_fx.models` with B base layers, of any width.
            blocks: K, from 1 to B.
            data: one (inputs, target) pair or an iterable of such, to check that the heads fit; None: unchecked.
            heads: the heads' name without depth. None: by the width of the first convolution, as the paper has it:
                ``"sedona-wide"`` (2048 features) from 32 channels on, ``"sedona"`` (512) below: quarter-width nets
                have 16, those of full width 64.

        Raises:
            PlanError: the variables are for another number of base layers, or are no such variables.
            HeadError: there is no such head, or one does not fit.
        """
        from sedona_fx.recipes.released import from_released

        return from_released(alpha, beta, model, blocks, data, heads)


def _finite(value: Any) -> Any:
    """Return a nested value with None for every number that is not finite; the same object where all are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        changed = {key: _finite(item) for key, item in value.items()}
        return value if all(changed[key] is item for key, item in value.items()) else changed
    if isinstance(value, (list, tuple)):
        items = [_finite(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def _written(inputs: dict[str, Any]) -> Any:
    """Return inputs as JSON. An argument may be infinite, and the net is called with it: ``{"float": "inf"}``."""

    def words(value: Any) -> Any:
        return {"float": repr(float(value))} if isinstance(value, float) and not math.isfinite(value) else value

    return pytree.tree_map(words, inputs)


def _read(inputs: dict[str, Any]) -> Any:
    """Return what :func:`_written` wrote."""

    def is_number(value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan")

    return pytree.tree_map(lambda v: float(v["float"]) if is_number(v) else v, inputs, is_leaf=is_number)


def _checked(name: str, value: Any, source: str) -> Any:
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
    elif not isinstance(value, dict):
        raise wrong("an object")
    elif name == "provenance":
        if isinstance(value.get("seed", 0), bool) or not isinstance(value.get("seed", 0), int):
            raise PlanError(f"{source}: the seed in the field 'provenance' should be a whole number.")
    else:
        for argument, spec in value.items():
            _check_spec(f"{source}: the input {argument!r}", spec)
        return _read(value)
    return value


def _check_spec(where: str, spec: Any) -> None:
    """Check the description of an input: a tensor's shape and dtype, or plain values, nested as the input was."""
    if isinstance(spec, list):
        for item in spec:
            _check_spec(where, item)
    elif isinstance(spec, dict) and spec.keys() == {"shape", "dtype"}:
        shape, dtype = spec["shape"], spec["dtype"]
        if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise PlanError(f"{where} has the shape {shape!r}, which should be a list of whole numbers.")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise PlanError(f"{where} has the dtype {dtype!r}, which torch does not know.")
    elif isinstance(spec, dict):
        for item in spec.values():
            _check_spec(where, item)
