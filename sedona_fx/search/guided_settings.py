"""Settings of the guided search, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedona_fx.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class GuidedSettings:
    """Settings of the search.

    Args:
        training_steps: what the search may cost, in steps of plain training. None: 25 epochs of the training data, a
            quarter of a run of 100.
        seconds: the same in seconds on this machine, in place of `training_steps`. A few steps are timed before the
            start; the numbers of steps that follow are kept in the plan and in `folder`.
        states: at how many states of the weights gradients are compared, at most.
        finalists: how many plans are rolled out, at most. With 0 or 1, gradients decide alone; so they do where a
            parameter is used on both sides of a place to cut.
        batch_size: samples per step of the first part; larger batches are split. For the same cost, more and noisier
            steps train the net and its heads further.
        lr: learning rate of SGD: constant in the first part, falling by a cosine in each round of the rollouts.
        momentum: of SGD.
        weight_decay: of SGD.
        val_batches: validation batches that score plans, at most.
        val_batch_size: samples per validation batch. None: as in training.
        folder: where the state of the search is saved. A search that was killed resumes from there when it is called
            again with the same settings, and gives the plan that it would have given without the interruption. None:
            nothing is saved.
        save_seconds: how long to wait after a save until the next one.
    """

    training_steps: int | None = None
    seconds: float | None = None
    states: int = 8
    finalists: int = 6
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    val_batches: int = 50
    val_batch_size: int | None = None
    folder: str | Path | None = None
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        at_least = {"training_steps": 1, "states": 1, "finalists": 0, "batch_size": 1, "val_batches": 1}
        for name, least in (at_least | {"val_batch_size": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"Guided({name}={value}): has to be at least {least}")
        if self.seconds is not None and (self.seconds <= 0 or self.training_steps is not None):
            why = "has to be above 0" if self.seconds <= 0 else "it is another way to say training_steps: give one"
            raise SettingsError(f"Guided(seconds={self.seconds}): {why}")
