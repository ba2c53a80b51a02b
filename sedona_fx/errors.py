"""Every error a user can meet, each with the place in the user's model and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sedona_fx.plan import Plan


class SedonaError(Exception):
    """Base of all errors raised on purpose by sedona_fx."""


class SettingsError(SedonaError, ValueError):
    """A setting of a search, a head rule or a loss has a value that it cannot have."""


class TraceError(SedonaError):
    """The model's forward cannot be turned into a graph, or the graph does not do what the model does."""


class GraphSpecError(SedonaError):
    """A pass produced a graph that breaks the specification of its phase (a bug in sedona_fx, not in the model)."""


class CutError(SedonaError):
    """The blocks asked for cannot be had: too many, too few, or cut at a place that is no legal cut."""


class BudgetError(CutError):
    """No plan keeps within the budget; with the least possible value of each limit, and a plan that has it."""


class HeadError(SedonaError):
    """An auxiliary head cannot be built for, or does not fit, the place where it should stand."""


class OutputError(SedonaError):
    """The primary output of the model cannot be found."""


class DataError(SedonaError):
    """The data does not serve: empty, exhausted, without targets, or not fitting the model or the loss."""


class PlanError(SedonaError):
    """A plan cannot be read, or was made for another model."""


class CheckpointError(SedonaError):
    """A checkpoint cannot be read, or belongs to another net, plan or schedule."""


class ScheduleError(SedonaError):
    """A schedule cannot train this net."""


class ExportError(SedonaError):
    """The net cannot be exported, or the exported file does not compute what the net computes."""


class NonFiniteLossError(SedonaError):
    """A local loss turned infinite or NaN. `block` and `step` are 0-based; `blocks` are all whose loss did."""

    def __init__(self, block: int, step: int, value: float, advice: str = "", blocks: Sequence[int] = ()) -> None:
        self.block, self.step, self.value, self.blocks = block, step, value, list(blocks) or [block]
        super().__init__(
            f"the loss of block {block} is {value} at step {step}. The parameters, optimizer state and BatchNorm "
            f"statistics of block {block} keep their values from before this step. "
            + (advice or "Lower the learning rate, clip the gradient, or look at the batch of this step.")
        )


class SearchDivergedError(SedonaError):
    """The search met a loss that is not finite. `plan` is the plan decoded from what was learned until then."""

    def __init__(self, where: str, plan: Plan | None) -> None:
        self.plan = plan
        kept = "the plan found so far is kept in `error.plan`" if plan is not None else "no plan had been found yet"
        super().__init__(f"the search's loss is not finite {where}; {kept}. Lower `lr`, or check the data.")


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``"; the nearest names are 'a', 'b'"``, or an empty string if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return "; the nearest names are " + ", ".join(repr(n) for n in near) if near else ""


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as people write it: ``(2, 64, 8, 8)``."""
    return "(" + ", ".join(str(int(s)) for s in shape) + ("," if len(shape) == 1 else "") + ")"
