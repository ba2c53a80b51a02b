"""Checkpoint files of ``fit``: replaced whole, read back once per run, and fully checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from sedona_fx.errors import CheckpointError
from sedona_fx.files import load_failure, read_torch_file, replacing
from sedona_fx.net.net import Net
from sedona_fx.net.weights import mismatch
from sedona_fx.train.schedules.base import Schedule

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
"""The fields of a checkpoint, with their types."""


def write(path: Path, state: Mapping[str, Any], *, prove: bool) -> None:
    """Write a checkpoint; it replaces the old file only when it is complete.

    Args:
        path: the file.
        state: the fields of :data:`FIELDS`.
        prove: read the new file before it replaces the old one. A state that ``torch.load`` refuses (that of an unusual
            optimizer or loader) is better found out now than when the checkpoint is needed.

    Raises:
        CheckpointError: the new file could not be read; the old one is still there.
    """
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        if prove:
            try:
                read_torch_file(temporary, "checkpoint")
            except CheckpointError as error:
                raise CheckpointError(
                    f"the checkpoint {str(path)!r} could be written but not read again: "
                    f"{load_failure(error.__cause__)}. State of optimizers, LR schedulers and loaders must be plain "
                    "numbers, texts, containers and tensors; torch.serialization.add_safe_globals allows more."
                ) from error.__cause__


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or was not written by this version of ``fit``.
    """
    try:
        state = read_torch_file(path, "checkpoint")
    except CheckpointError as error:
        raise CheckpointError(f"{error} Delete it to start anew.") from error.__cause__
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of this version of sedona_fx.fit. Delete it to start anew."
        )
    for name, kind in FIELDS.items():
        if name not in state or not isinstance(state[name], kind):
            raise CheckpointError(f"{str(path)!r} is damaged: the field {name!r} is missing or of another type.")
    return state


def check(
    state: Mapping[str, Any],
    path: Path,
    *,
    net: Net,
    schedule: Schedule,
    rates: Sequence[LRScheduler],
    seed: int,
) -> None:
    """Check that a checkpoint belongs to this run; nothing is loaded.

    Args:
        state: what :func:`read` returned.
        path: where it was read, for the error's text.
        net: the net of this run.
        schedule: its schedule.
        rates: its LR schedulers.
        seed: its seed.

    Raises:
        CheckpointError: it does not; with the first difference.
    """
    where = f"the checkpoint {str(path)!r}"
    if state["seed"] != seed:
        raise CheckpointError(f"{where} was written with seed={state['seed']}, not {seed}.")
    kinds = [type(rate).__name__ for rate in rates]
    try:
        saved_kinds = [rate[0] for rate in state["rates"]]
        if kinds != saved_kinds:
            raise CheckpointError(f"holds the LR schedulers {saved_kinds}, this run has {kinds}.")
        schedule.check_state(state["schedule"])
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}.") from error
    if difference := mismatch(net, state["net"], dtypes=True):
        raise CheckpointError(f"{where} belongs to another net: {difference}.")
