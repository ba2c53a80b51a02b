"""Settings that searches by trial have in common, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedona_fx.errors import SettingsError

DEFAULT_EPOCHS = 25
"""What a search may cost if nothing is said, in epochs of training."""


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What a search by trial may cost, how it trains, what it judges plans by, and where its state is kept.

    Args:
        training_steps: what the search may cost, in steps of plain training. None: 25 epochs of the training data, a
            quarter of a run of 100.
        lr: learning rate of SGD: constant before the rollouts, falling by a cosine in each round of them.
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
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    val_batches: int = 50
    val_batch_size: int | None = None
    folder: str | Path | None = None
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        self.require_at_least(training_steps=1, val_batches=1, val_batch_size=1)

    def require_at_least(self, **least: int) -> None:
        """Check that settings, by name, are None or not below a number.

        Raises:
            SettingsError: one is.
        """
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise SettingsError(f"{type(self).__name__}({name}={value}): has to be at least {lowest}")
