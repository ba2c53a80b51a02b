"""Weight files of a net: what differs, by name and shape, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
