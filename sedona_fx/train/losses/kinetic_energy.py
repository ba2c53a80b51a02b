"""Kinetic energy: base layers change their activations as little as they can (TRGL; Karkar et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sedona_fx.data.args import Args
from sedona_fx.errors import ScheduleError
from sedona_fx.train.losses.base import ExtraLoss, Sight, at_least_single, check_weights


@dataclass(frozen=True)
class KineticEnergy:
    """The transport cost of a block (TRGL: Karkar, Ayed, de Bezenac, Gallinari; NeurIPS 2023).

    ``1 / (2 tau) * sum over layers of mean over the batch of || x_out - x_in ||^2``, over those base layers of the
    block whose output has the shape of their input. This is a step of the minimizing movement scheme: a block whose
    loss is already small leaves the activations as they are. The released code takes the residual branch before the
    last ReLU for ``x_out - x_in``; here it is the difference of output and input, which layers of any kind have.

    Attributes:
        weight: factor of the cost.
        keep: factor of the local loss.
        tau: the step size of the scheme; the larger, the less the cost restricts the blocks.
        average: take the mean over the features instead of the paper's sum. The released code does that: its values of
            tau are for the mean.

    Raises:
        ScheduleError: a setting is out of range.
    """

    weight: float = 1.0
    keep: float = 1.0
    tau: float = 1.0
    average: bool = True
    needs_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self)
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ScheduleError(
                f"KineticEnergy(tau={self.tau}) must be a positive number: the cost is divided by 2 tau."
            )

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return the loss of a block; it has no parameters."""
        return _Transport(self)


class _Transport(ExtraLoss):
    def __init__(self, settings: KineticEnergy) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, sight: Sight) -> Tensor:
        """Return the cost, a scalar; 0 for a block in which every layer changes the shape."""
        total = at_least_single(sight.activation).new_zeros(())
        examples = Args(**sight.inputs).batch_size()
        for before, after in zip(sight.layers, sight.layers[1:], strict=False):
            if before.shape == after.shape and before.is_floating_point() and after.is_floating_point():
                squares = (at_least_single(after) - at_least_single(before)).square()
                total = total + (
                    squares.mean() if self.settings.average else squares.sum() / (examples or len(squares))
                )
        return total / (2 * self.settings.tau)
