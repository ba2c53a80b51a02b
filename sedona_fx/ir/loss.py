"""Losses by name: what a plan notes of a net's loss, since functions are not saved, and the way back from the name."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from sedona_fx.ir.outputs import Loss

NO_LOSS = "none"
"""What stands for ``loss=None``."""


def loss_name(loss: Any) -> str:
    """Return the qualified name of a loss.

    That is ``module.qualname`` for functions and methods, the class for other objects. Of PyTorch's own losses and of
    ``functools.partial``, settings that are not the default stand behind it:
    ``torch.nn.modules.loss.CrossEntropyLoss(label_smoothing=0.1)``.

    Args:
        loss: any callable; None gives :data:`NO_LOSS`.
    """
    if loss is None:
        return NO_LOSS
    if isinstance(loss, functools.partial):
        given = {**{str(k): value for k, value in enumerate(loss.args)}, **loss.keywords}
        return f"functools.partial({', '.join([loss_name(loss.func), *_settings(given)])})"
    if hasattr(loss, "__qualname__"):
        return f"{loss.__module__}.{loss.__qualname__}"
    name = f"{type(loss).__module__}.{type(loss).__qualname__}"
    settings = _settings(_changed(loss)) if type(loss).__module__ == nn.modules.loss.__name__ else []
    return f"{name}({', '.join(settings)})" if settings else name


def named_loss(name: str) -> Loss | None:
    """Return the loss of a name if it is one of PyTorch's with its default settings; otherwise None."""
    for module, make in ((nn.functional, False), (nn.modules.loss, True)):
        found = getattr(module, name.removeprefix(f"{module.__name__}."), None)
        if callable(found) and loss_name(found) == name:
            loss: Loss = found() if make else found
            return loss
    return None


def same_loss(a: str, b: str) -> bool:
    """Return whether two names can be of one loss: a script's module is ``__main__`` where it is run itself."""
    if "__main__" in (a.partition(".")[0], b.partition(".")[0]):
        return a.rpartition(".")[2] == b.rpartition(".")[2]
    return a == b


def _changed(loss: nn.Module) -> dict[str, Any]:
    """Return the settings of one of PyTorch's losses that are not those of the class as such."""
    try:
        default: Any = vars(type(loss)())
    except TypeError:
        default = {}
    settings = {k: v for k, v in vars(loss).items() if not k.startswith("_") and k != "training"}
    buffers = dict(loss.named_buffers())
    return buffers | {k: v for k, v in settings.items() if k not in default or not _equal(default[k], v)}


def _equal(a: Any, b: Any) -> bool:
    both = isinstance(a, float) and isinstance(b, float)
    return type(a) is type(b) and (a == b or (both and math.isnan(a) and math.isnan(b)))


def _settings(values: dict[str, Any]) -> list[str]:
    """Return ``name=value`` for each setting, with the shape of a tensor and the name of any other object."""

    def text(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"tensor{tuple(value.shape)}"
        plain = (str, int, float, bool, type(None), list, tuple)
        return repr(value) if isinstance(value, plain) else loss_name(value)

    return [f"{name}={text(value)}" for name, value in sorted(values.items())]
