"""Weight files of a net: written whole, and compared by name and shape before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import CheckpointError
from sedona_fx.files import read_torch_file, replacing


def save_weights(path: Path, parts: Mapping[str, nn.Module], steps: int) -> None:
    """Write the states of some modules, each under its name, and the number of training steps taken."""
    with replacing(path) as temporary:
        torch.save({**{name: module.state_dict() for name, module in parts.items()}, "steps": steps}, temporary)


def load_weights(path: str | Path, parts: Mapping[str, nn.Module]) -> int:
    """Load what :func:`save_weights` wrote into modules of the same names; return the number of steps.

    Raises:
        CheckpointError: unreadable, or of another net; nothing is loaded then.
    """
    state = read_torch_file(path, "weights")
    for name, module in parts.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), dict) or "steps" not in state:
            raise CheckpointError(f"{str(path)!r} holds no {name!r}: it was not written by net.save(folder).")
        if difference := mismatch(module, state[name]):
            raise CheckpointError(f"{str(path)!r} belongs to another net: {name} {difference}.")
    for name, module in parts.items():
        module.load_state_dict(state[name])
    return int(state["steps"])


def mismatch(module: nn.Module, state: Mapping[str, Any], *, dtypes: bool = False) -> str:
    """Return the first difference in names and shapes (and dtypes) between a module's state and another, or ``""``."""

    def describe(value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__
        return f"{tuple(value.shape)}" + (f" {str(value.dtype).removeprefix('torch.')}" if dtypes else "")

    theirs = {name: describe(value) for name, value in state.items()}
    ours = {name: describe(value) for name, value in module.state_dict().items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name!r} is {theirs.get(name, 'missing')} in the file and {ours.get(name, 'missing')} here"
    return ""
