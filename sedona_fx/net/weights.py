"""Weight files of a net. Names and shapes are compared before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import CheckpointError
from sedona_fx.files import read_torch_file, replacing


def save_weights(path: Path, parts: Mapping[str, nn.Module], steps: int) -> None:
    """Write the state dicts of modules and the number of training steps to a file, replaced as a whole.

    Args:
        path: of the file.
        parts: name -> module.
        steps: training steps taken.
    """
    with replacing(path) as temporary:
        torch.save({**{name: module.state_dict() for name, module in parts.items()}, "steps": steps}, temporary)


def load_weights(path: str | Path, parts: Mapping[str, nn.Module]) -> int:
    """Load what :func:`save_weights` wrote into modules of the same names.

    Returns:
        The number of training steps taken.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another net; nothing is loaded then.
    """
    state = read_torch_file(path, "weights")
    for name, module in parts.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), dict) or "steps" not in state:
            raise CheckpointError(
                f"{str(path)!r} holds no {name!r}: it was not written by net.save(folder). Give the weights.pt of such "
                "a folder."
            )
        if difference := mismatch(module, state[name]):
            raise CheckpointError(
                f"{str(path)!r} belongs to another net: {name} {difference}. Load it with a model of the same "
                "architecture and the plan that was saved beside it."
            )
    for name, module in parts.items():
        module.load_state_dict(state[name])
    return int(state["steps"])


def mismatch(module: nn.Module, state: Mapping[str, Any], *, dtypes: bool = False) -> str:
    """Return the first difference between a module's state dict and another, in words, or ``""`` if there is none.

    Args:
        module: whose state dict is compared.
        state: the other one, from a file.
        dtypes: compare dtypes as well as names and shapes.
    """

    def describe(value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__
        return f"{tuple(value.shape)}" + (f" {str(value.dtype).removeprefix('torch.')}" if dtypes else "")

    saved = {name: describe(value) for name, value in state.items()}
    present = {name: describe(value) for name, value in module.state_dict().items()}
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            return f"{name!r} is {saved.get(name, 'missing')} in the file and {present.get(name, 'missing')} here"
    return ""
