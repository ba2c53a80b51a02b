"""How long the steps of a search take, measured before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TIMED_STEPS = 4
"""Steps that are run to be timed; the first warms up caches and is not counted."""
MEASURED_SHARE = 0.02
"""What share of a search's cost timing may take where it only serves to announce the duration."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of SEDONA's two kinds of step.

    Attributes:
        relaxed_seconds: of a relaxed training step.
        meta_seconds: of a meta-iteration, its own training step included.
    """

    relaxed_seconds: float
    meta_seconds: float


def measure(relaxed_step: Callable[[], None], meta_iteration: Callable[[], None], device: torch.device) -> StepSeconds:
    """Time a few relaxed steps, of which the median counts, and one meta-iteration. Hand in steps on copies."""
    relaxed = [seconds_of(relaxed_step, device) for _ in range(TIMED_STEPS)][1:]
    return StepSeconds(statistics.median(relaxed), seconds_of(meta_iteration, device))


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Time one step, to the end of its work on the device."""
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
