"""What a plan notes of the capture: how the model's forward became a graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sedona_fx.errors import PlanError, did_you_mean

FrontEnd = Literal["symbolic", "export"]


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
    sizes = tuple(_read_size(size, source) for size in value.get("free_sizes", []))
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
