"""How long the steps of a search take, measured before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TIMED_STEPS = 4
"""Steps that are run to be timed; the first one, which warms caches up, does not count."""
MEASURED_SHARE = 0.02
"""What timing may cost of a search where nothing depends on it but the time that it announces."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a relaxed training step, and of a meta-iteration with its own training step."""

    relaxed_seconds: float
    meta_seconds: float


def measure(relaxed_step: Callable[[], None], meta_iteration: Callable[[], None], device: torch.device) -> Pace:
    """Time the median of a few relaxed steps, and one meta-iteration. Hand in steps on copies."""
    relaxed = [seconds_of(relaxed_step, device) for _ in range(TIMED_STEPS)][1:]
    return Pace(statistics.median(relaxed), seconds_of(meta_iteration, device))


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Time one step."""
    _finish(device)
    start = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
