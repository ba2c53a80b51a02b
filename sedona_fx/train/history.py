"""What ``fit`` did, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave.

    Attributes:
        epoch: its number, from 0.
        losses: mean losses over the batches: one per block, or only the final loss for schedules without local losses.
        seconds: time spent on training, evaluation not included.
        val_loss: mean loss of the final output on the evaluation data; None without such data.
        val_accuracy: accuracy on the evaluation data, where the targets are classes.
        val_metrics: means of the metrics on the evaluation data, by name.
    """

    epoch: int
    losses: list[float]
    seconds: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class History:
    """What ``fit`` did: one entry per epoch."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on training, evaluation not included."""
        return sum(epoch.seconds for epoch in self.epochs)
