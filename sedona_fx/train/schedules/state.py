"""Check a schedule's saved state before anything of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.late_buffers import late_buffers
from sedona_fx.errors import CheckpointError
from sedona_fx.files import is_count
from sedona_fx.rng import are_random_states
from sedona_fx.runtime.optimizer_state import optimizer_fault

_ADVICE = {
    "schedule": "Go on with the schedule that wrote it.",
    "options": "Make the schedule with the options that it was written with.",
    "cuts": "Load it into a net made with the same plan.",
    "optimizer_types": "Go on with the optimizers that wrote it.",
    "optimizer_shapes": "Load it into a net made with the same plan, with the same parameters frozen.",
}


def check_identity(state: Any, identity: Mapping[str, Any]) -> None:
    """Check that a state is of the same schedule.

    Args:
        state: the state to check.
        identity: what must be equal in the state, by key (a key of ``_ADVICE``).

    Raises:
        CheckpointError: it is not; with the first difference.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"the state of a schedule is a dict, not {type(state).__name__}.")
    for name, ours in identity.items():
        if state.get(name) != ours:
            raise CheckpointError(
                f"the state does not fit: its {name.replace('_', ' ')} is {_short(state.get(name))}, here it is "
                f"{_short(ours)}. {_ADVICE[name]}"
            )


def check_state(
    state: Mapping[str, Any], fields: Collection[str], optimizers: Sequence[torch.optim.Optimizer | None]
) -> None:
    """Check that a state of the same schedule is complete, and fits its optimizers.

    Args:
        state: the state to check.
        fields: what it must have besides its identity and the state of the optimizers.
        optimizers: the schedule's, one per block; None where nothing is trained.

    Raises:
        CheckpointError: it does not fit; with the first difference.
    """
    saved = state.get("optimizers")
    if not set(fields) <= state.keys() or not isinstance(saved, list) or len(saved) != len(optimizers):
        raise CheckpointError("the state of the schedule is not complete.")
    for index, (optimizer, saved_state) in enumerate(zip(optimizers, saved, strict=True)):
        if optimizer is None or saved_state is None:
            fault = "" if optimizer is saved_state else "it trains nothing, here or in the state"
        else:
            fault = optimizer_fault(optimizer, saved_state)
        if fault:
            raise CheckpointError(f"the state of the optimizer of block {index} does not fit: {fault}.")


def check_numbers(
    state: Mapping[str, Any],
    parameters: Sequence[Sequence[Tensor]],
    scalers: Sequence[torch.amp.GradScaler] | None,
    accumulate: int,
) -> None:
    """Check counters, gradients, scalers and random states of a schedule's state.

    Args:
        state: the state, with all its fields.
        parameters: for each block the parameters that it steps.
        scalers: of the schedule.
        accumulate: steps of a window.

    Raises:
        CheckpointError: one has a value that it cannot have.
    """
    steps, calls, gradients = state["steps"], state["calls"], state["gradients"]
    require(is_count(steps), f"its number of steps is {str(steps)[:50]}")
    require(is_count(calls) and calls < accumulate, f"it is at step {str(calls)[:50]} of a window of {accumulate}")
    require(state["random"] is None or are_random_states(state["random"]), "its random states cannot be set")
    require((gradients is None) == (calls == 0), "gradients belong to an unfinished window of accumulation")
    if gradients is not None:
        shapes = [[None if g is None else _shape(g) for g in block] for block in _lists(gradients)]
        expected = [[_shape(p) for p in block] for block in parameters]
        require([len(block) for block in shapes] == [len(block) for block in expected], "it has other gradients")
        pairs = [(a, b) for of in zip(shapes, expected, strict=True) for a, b in zip(*of, strict=True)]
        require(all(a in (None, b) for a, b in pairs), "its gradients have other shapes or dtypes than the parameters")
    saved = state["scalers"]
    ours = [scaler.state_dict() for scaler in scalers] if scalers is not None else None
    require((saved is None) == (ours is None), "it has gradient scalers, or has none, where this schedule differs")
    for a, b in zip(saved or [], ours or [], strict=False):
        require(isinstance(a, dict) and a.keys() == b.keys(), "it has the state of another kind of gradient scaler")
        numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in a.values())
        require(numbers and (not a or a["scale"] > 0), f"a gradient scaler has the state {str(a)[:100]}")
    require(len(saved or []) == len(ours or []), "it has another number of gradient scalers")


def check_flight(flight: Any, blocks: int, steps: int) -> None:
    """Check the saved state of a batch in flight as far as no net is needed.

    Args:
        flight: the state.
        blocks: of the net.
        steps: training steps taken.

    Raises:
        CheckpointError: it is none.
    """
    whole = isinstance(flight, dict) and flight.keys() == {"step", "training", "gradients", "held"}
    require(whole, "a batch in flight is not complete")
    require(is_count(flight["step"]) and flight["step"] < steps, "a batch in flight is of a step that was not taken")
    require(isinstance(flight["training"], bool), "a batch in flight is of no mode")
    gradients, held = flight["gradients"], flight["held"]
    require(
        isinstance(gradients, dict) and all(isinstance(g, Tensor) for g in gradients.values()),
        "a batch in flight has gradients that are no tensors",
    )
    require(isinstance(held, list) and len(held) == blocks, "a batch in flight has another number of blocks")
    for entry in held:
        kept = isinstance(entry, dict) and entry.keys() == {"inputs", "weights", "buffers"}
        require(entry is None or (kept and isinstance(entry["inputs"], dict)), "what a block holds is not complete")


def check_replay(state: Any, blocks: int, capacity: int) -> None:
    """Check what :class:`~sedona_fx.train.Replay` saves besides the batches in its buffers.

    Args:
        state: the state.
        blocks: of the net.
        capacity: of a buffer.

    Raises:
        CheckpointError: it is not complete, or a counter has a value that it cannot have.
    """
    fields = {"buffers", "counts", "full", "stored", "latest"}
    require(isinstance(state, dict) and state.keys() == fields, "what it replays is not complete")
    counts, full, latest = state["counts"], state["full"], state["latest"]
    whole = isinstance(counts, dict) and counts.keys() == {"unused", "not_stored", "turns", "skipped"}
    require(whole and all(is_count(counts[name]) for name in ("unused", "not_stored")), "its counts are no numbers")
    for name in ("turns", "skipped"):
        fits = isinstance(counts[name], list) and len(counts[name]) == blocks and all(map(is_count, counts[name]))
        require(fits, f"its {name} are not one number a block")
    require(full is None or (is_count(full) and full > 0), "its size of a full batch is none")
    require(is_count(state["stored"]) and state["stored"] <= capacity, "it has stored more batches than it keeps")
    scalars = isinstance(latest, list) and all(t is None or (isinstance(t, Tensor) and t.dim() == 0) for t in latest)
    require(scalars and len(latest) == blocks, "its latest losses are not one a block")
    require(isinstance(state["buffers"], list) and len(state["buffers"]) == blocks - 1, "it has other buffers")


def require(fits: bool, fault: str) -> None:
    """Raise :class:`CheckpointError` with a fault unless a state fits."""
    if not fits:
        raise CheckpointError(f"the state of the schedule is damaged: {fault}.")


def same_tensors(saved: Any, ours: Sequence[Tensor]) -> bool:
    """Return whether a value from a file is a list of tensors with the shapes and dtypes of others."""
    return isinstance(saved, list) and [_shape(t) for t in saved] == [_shape(t) for t in ours]


def _shape(value: Any) -> tuple[Any, ...]:
    return (tuple(value.shape), value.dtype, value.layout) if isinstance(value, Tensor) else (type(value),)


def _lists(value: Any) -> list[list[Any]]:
    require(isinstance(value, list) and all(isinstance(item, list) for item in value), "it has no lists of gradients")
    return list(value)


def described(thing: Any) -> str:
    """Return a text that identifies an object of the user's in a saved state, without its address.

    It is the object's ``repr``, or the name of its class where the class has no ``repr`` of its own.
    """
    kind = type(thing)
    return repr(thing) if kind.__repr__ is not object.__repr__ else f"{kind.__module__}.{kind.__qualname__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


def check_held(
    held: Mapping[str, Any],
    index: int,
    inputs: Sequence[str],
    *,
    stashed: tuple[Sequence[Tensor], nn.Module] | None,
) -> None:
    """Check what a block holds for a batch that is in flight.

    Args:
        held: the block's entry in the state of the batch.
        index: of the block.
        inputs: names of what the block reads.
        stashed: the parameters whose copies are stashed, and the module whose buffers are; None: nothing is stashed.
            Buffers that get their size in the first forward may have another one.

    Raises:
        CheckpointError: it is damaged.
    """
    require(held["inputs"].keys() == set(inputs), f"block {index} holds other inputs of a batch")
    weights, module = stashed if stashed is not None else ((), nn.Module())
    theirs, ours, late = held["buffers"], list(module.buffers()), set(late_buffers(module).values())
    fits = isinstance(theirs, list) and len(theirs) == len(ours) and same_tensors(held["weights"], weights)
    fits = fits and all(_shape(a)[b in late :] == _shape(b)[b in late :] for a, b in zip(theirs, ours, strict=True))
    require(fits, f"block {index} holds weights or buffers of other shapes for a batch")
