"""Checkpoint files of ``fit``: written whole, proved readable once, and checked in full before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from sedona_fx.errors import CheckpointError
from sedona_fx.files import replacing
from sedona_fx.net.weights import mismatch
from sedona_fx.train.schedules.base import Schedule

if TYPE_CHECKING:
    from sedona_fx.net.net import Net

FORMAT = 3
FIELDS: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "batch": int,
    "done": int,
    "sums": list,
    "seconds": float,
    "seed": int,
    "net": dict,
    "schedule": dict,
    "rates": list,
    "history": list,
    "random": (list, type(None)),
    "streams": list,
    "loader": object,
}
"""What a checkpoint holds, and of which type."""


def write(path: Path, state: Mapping[str, Any], *, prove: bool) -> None:
    """Write a checkpoint; it takes the place of the old one when it is complete.

    With `prove` it is read back first: a state that cannot be loaded again (an optimizer's or a loader's of an unusual
    type) is better known now than when it is needed.
    """
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        if prove:
            try:
                torch.load(temporary, map_location="cpu", weights_only=True)
            except Exception as error:
                raise CheckpointError(
                    f"the checkpoint {str(path)!r} could be written but not read again: {_reason(error)} State of "
                    "optimizers, LR schedulers and loaders must be plain numbers, texts, containers and tensors; "
                    "torch.serialization.add_safe_globals allows more."
                ) from error


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is none of ``fit``.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot read the checkpoint {str(path)!r}: {_reason(error)} Delete it to start anew."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of this version of sedona_fx.fit. Delete it to start anew."
        )
    for name, kind in FIELDS.items():
        if name not in state or not isinstance(state[name], kind):
            raise CheckpointError(f"{str(path)!r} is damaged: the field {name!r} is missing or of another type.")
    return state


def check(
    state: Mapping[str, Any], path: Path, net: Net, schedule: Schedule, rates: Sequence[LRScheduler], seed: int
) -> None:
    """Find out whether a checkpoint belongs to this run. Nothing is loaded.

    Raises:
        CheckpointError: it does not, with the first difference.
    """
    where = f"the checkpoint {str(path)!r}"
    if state["seed"] != seed:
        raise CheckpointError(f"{where} was written with seed={state['seed']}, not {seed}.")
    kinds = [type(rate).__name__ for rate in rates]
    try:
        theirs = [rate[0] for rate in state["rates"]]
        if kinds != theirs:
            raise CheckpointError(f"holds the LR schedulers {theirs}, this run has {kinds}.")
        schedule.check_state(state["schedule"])
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}.") from error
    if difference := mismatch(net, state["net"], dtypes=True):
        raise CheckpointError(f"{where} belongs to another net: {difference}.")


def _reason(error: Exception) -> str:
    """Return why a file could not be read, without the page of advice that PyTorch adds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0] if lines else "")
    return f"{type(error).__name__}: {told.split('Please use')[0].strip()}"
