"""Mixed precision: forward under autocast, backward outside of it, gradients scaled where float16 would lose them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sedona_fx.errors import ScheduleError

LOW = (torch.bfloat16, torch.float16)


def check_autocast(dtype: torch.dtype | None) -> None:
    """Raise if a schedule's ``autocast=`` is nothing to cast to."""
    if dtype is not None and dtype not in LOW:
        raise ScheduleError(f"autocast={dtype!r}: give torch.bfloat16, torch.float16, or None.")


@contextmanager
def casting(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the body under autocast to `dtype`; None leaves things as the user has them."""
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Leave the user's autocast region: backward runs in the dtypes that forward chose.

    The weights that autocast has cast and cached are dropped at the end: a region may span several steps, and what is
    cached is from before the update.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
        torch.clear_autocast_cache()
    else:
        yield


def scaled(gradient: Tensor, like: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Return a gradient in true units as the backward pass of a block wants it: scaled, in the dtype and
    on the device of its root."""
    if scaler is not None:
        gradient = scaler.scale(gradient)
    return gradient.to(like.device, like.dtype)


def unscaled(gradient: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Return a gradient that left a scaled backward pass in true units, in float32 at least: it underflows less."""
    if scaler is None:
        return gradient
    wide = gradient.float() if gradient.dtype in LOW else gradient
    return wide / scaler.scale(torch.ones((), device=gradient.device, dtype=wide.dtype))
