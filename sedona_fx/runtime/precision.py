"""Mixed precision: forward under autocast, backward outside it, gradients scaled where float16 would underflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sedona_fx.errors import ScheduleError

LOW = (torch.bfloat16, torch.float16)
"""The dtypes that autocast may cast to."""


def check_autocast(dtype: torch.dtype | None) -> None:
    """Check a schedule's ``autocast=``.

    Raises:
        ScheduleError: it is neither None nor one of :data:`LOW`.
    """
    if dtype is not None and dtype not in LOW:
        raise ScheduleError(f"autocast={dtype!r}: give torch.bfloat16, torch.float16, or None.")


@contextmanager
def casting(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the body under autocast to `dtype`; with None, the caller's own autocast state stays as it is."""
    if dtype is None:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Run the body outside the caller's autocast region: backward runs in the dtypes that forward chose.

    The cache of cast weights is cleared at the end: an autocast region may span several steps, and the cached casts
    are of the weights before the update.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
        torch.clear_autocast_cache()
    else:
        yield


def scaled(gradient: Tensor, like: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Return an unscaled gradient in the form in which a block's backward pass takes it.

    Args:
        gradient: the gradient with respect to `like`, unscaled.
        like: the root of the backward pass; gives dtype and device.
        scaler: the block's gradient scaler, or None.
    """
    if scaler is not None:
        gradient = scaler.scale(gradient)
    return gradient.to(like.device, like.dtype)


def unscaled(gradient: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Return a gradient from a scaled backward pass, divided by the scale.

    The result of a scaled gradient has at least float32, where it underflows less; without a scaler the gradient is
    returned as it is.
    """
    if scaler is None:
        return gradient
    wide = gradient.float() if gradient.dtype in LOW else gradient
    return wide / scaler.scale(torch.ones((), device=gradient.device, dtype=wide.dtype))


def overflows(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return what a scaler found when it unscaled an optimizer's gradients: scalars, 1.0 where it will skip the step.

    One a device; none if the scaler is disabled, or has unscaled nothing.
    """
    return list(scaler._found_inf_per_device(optimizer).values()) if scaler.is_enabled() else []
