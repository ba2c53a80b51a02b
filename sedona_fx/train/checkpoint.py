"""Checkpoint files of ``fit``: replaced whole, read back once per run, and fully checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.optim.lr_scheduler import LRScheduler

from sedona_fx.errors import CheckpointError
from sedona_fx.files import is_count, load_failure, read_torch_file, replacing, torch_save
from sedona_fx.ir.loss import same_loss
from sedona_fx.net.net import Net
from sedona_fx.net.weights import mismatch, other_blocks
from sedona_fx.rng import are_random_states
from sedona_fx.runtime import finite
from sedona_fx.runtime.gradients import first_not_finite
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
        torch_save({"format": FORMAT, **state}, temporary)
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
        schedule.check_identity(state["schedule"])
        if difference := _other_net(net, state):
            raise CheckpointError(f"it belongs to another net: {difference}.")
        schedule.check_state(state["schedule"])
        for rate, (_, saved) in zip(rates, state["rates"], strict=True):
            if fault := _rate_fault(rate, saved):
                raise CheckpointError(f"it is damaged: the state of its {type(rate).__name__} {fault}.")
        if fault := _fault(state, len(net.blocks)):
            raise CheckpointError(f"it is damaged: {fault}.")
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}.") from error


def not_finite_in(net: Net, schedule: Schedule) -> set[str]:
    """Return the names of what is not finite and would be in a checkpoint: on purpose, before the first step."""
    return {name for name, value in _numbers(net, schedule) if first_not_finite([(name, value)]) is not None}


def refuse_not_finite(path: Path, *, net: Net, schedule: Schedule, allowed: Set[str]) -> None:
    """Check that no weight has turned infinite or NaN; it would be written over the last good one.

    Args:
        path: the checkpoint, for the error's text.
        net: the net of this run.
        schedule: its schedule.
        allowed: names of what need not be finite.

    Raises:
        CheckpointError: one has.
    """
    finite.refuse_not_finite(
        (pair for pair in _numbers(net, schedule) if pair[0] not in allowed),
        refusal=f"no checkpoint is written behind step {net.steps - 1}, and {str(path)!r} is kept as it is",
        advice="All losses were finite: the optimizer's step, or numbers that a layer keeps, were too large for the "
        "dtype. Lower the learning rate, or look at the inputs.",
    )


def _numbers(net: Net, schedule: Schedule) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield, by name, the weights and buffers in a checkpoint, and the gradients of a window that is open."""
    yield from ((name, value) for name, value in net.state_dict().items() if isinstance(value, torch.Tensor))
    names = net.engine.parameter_names()
    for parameter in (p for parameters in schedule.parameters for p in parameters):
        name = names.get(parameter, "a parameter of an extra loss")
        yield name, parameter
        if parameter.grad is not None and schedule.scalers is None:
            yield f"the gradient of {name}", parameter.grad


def _other_net(net: Net, state: Mapping[str, Any]) -> str:
    """Return the first difference between the net of a checkpoint and another, or ``""``."""
    noted = getattr(state["net"], "_metadata", {}).get("", {}).get("plan")
    if difference := other_blocks(net.plan, noted) or mismatch(net, state["net"], dtypes=True):
        return difference
    theirs, ours = state.get("loss"), net.plan.loss  # not in files from before losses were named
    if theirs is not None and ours is not None and not same_loss(str(theirs), ours):
        return f"it was trained by the loss {theirs}, this one is by {ours}"
    return ""


def _fault(state: Mapping[str, Any], blocks: int) -> str:
    """Return which of the counters, sums and random states of a checkpoint cannot be, or ``""``."""
    epoch, batch, done, sums = (state[name] for name in ("epoch", "batch", "done", "sums"))
    for name in ("epoch", "batch", "done"):
        if not is_count(state[name]):
            return f"its counter {name!r} is {str(state[name])[:50]}"
    entries = state["history"]
    if not all(map(_is_epoch, entries)):
        return "its history is no list of epochs"
    if [entry.get("epoch") for entry in entries] != list(range(len(entries))) or len(entries) != epoch:
        return f"its history has {len(entries)} epochs, and it is behind epoch {epoch}"
    if done < epoch + batch:
        return f"it is behind {done} batches, and behind batch {batch} of epoch {epoch}"
    if not all(map(_is_number, [*sums, state["seconds"]])) or not 0 <= state["seconds"] < math.inf:
        return "its sums or seconds are no numbers"
    inside = state["random"] is not None
    if inside != (batch > 0) or (inside and len(sums) not in (1, blocks)) or (not inside and sums):
        return f"its sums and random states are not those of batch {batch} of an epoch"
    if inside and not are_random_states(state["random"]):
        return "its random states cannot be set"
    return ""


def _is_epoch(entry: Any) -> bool:
    losses = entry.get("losses") if isinstance(entry, dict) else None
    if not isinstance(losses, list) or not losses or not all(map(_is_number, [*losses, entry.get("seconds")])):
        return False
    return all(entry.get(name) is None or _is_number(entry[name]) for name in ("val_loss", "val_accuracy"))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rate_fault(rate: LRScheduler, saved: Any) -> str:
    """Return why a state does not fit an LR scheduler, in words, or ``""``: it would take over whatever it is given."""
    if not isinstance(saved, dict):
        return f"is {type(saved).__name__}"
    for name, ours in rate.state_dict().items():
        theirs = saved.get(name)
        fits = True
        if name in ("last_epoch", "_step_count"):
            fits = is_count(theirs)
        elif _is_number(ours):
            fits = _is_number(theirs) and math.isfinite(theirs)
        elif name in ("base_lrs", "_last_lr") and isinstance(ours, list):
            fits = isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_is_rate, theirs))
        if not fits:
            return f"has {name} = {str(theirs)[:50]}"
    return ""


def _is_rate(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (_is_number(value) and math.isfinite(value))
