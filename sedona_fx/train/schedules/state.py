"""Check a schedule's saved state before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sedona_fx.errors import CheckpointError

_ADVICE = {
    "schedule": "Go on with the schedule that wrote it.",
    "options": "Make the schedule with the options that it was written with.",
    "cuts": "Load it into a net made with the same plan.",
    "optimizer_types": "Go on with the optimizers that wrote it.",
    "optimizer_shapes": "Load it into a net made with the same plan, with the same parameters frozen.",
}


def check_state(
    state: Any,
    identity: Mapping[str, Any],
    fields: Collection[str],
    optimizers: Sequence[torch.optim.Optimizer | None],
) -> None:
    """Check that a state fits a schedule.

    Args:
        state: the state to check.
        identity: what must be equal in the state, by key (a key of ``_ADVICE``).
        fields: what else the state must have.
        optimizers: the schedule's, one per block; None where nothing is trained.

    Raises:
        CheckpointError: it does not fit; with the first difference.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"the state of a schedule is a dict, not {type(state).__name__}.")
    for name, ours in identity.items():
        if state.get(name) != ours:
            raise CheckpointError(
                f"the state does not fit: its {name.replace('_', ' ')} is {_short(state.get(name))}, here it is "
                f"{_short(ours)}. {_ADVICE[name]}"
            )
    saved = state.get("optimizers")
    if not set(fields) <= state.keys() or not isinstance(saved, list) or len(saved) != len(optimizers):
        raise CheckpointError("the state of the schedule is not complete.")
    for index, (optimizer, saved_state) in enumerate(zip(optimizers, saved, strict=True)):
        ours = _group_sizes(optimizer.param_groups) if optimizer is not None else None
        theirs = _group_sizes(saved_state["param_groups"]) if saved_state is not None else None
        if ours != theirs:
            raise CheckpointError(
                f"the optimizer of block {index} has parameter groups of {ours} here and {theirs} in the state."
            )


def described(thing: Any) -> str:
    """Return a text that identifies an object of the user's in a saved state, without its address.

    It is the object's ``repr``, or the name of its class where the class has no ``repr`` of its own.
    """
    kind = type(thing)
    return repr(thing) if kind.__repr__ is not object.__repr__ else f"{kind.__module__}.{kind.__qualname__}"


def _group_sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
