"""Kinetic energy: base layers move their activations as little as they can (TRGL; Karkar et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sedona_fx.errors import ScheduleError
from sedona_fx.train.losses.base import ExtraLoss, Sight, at_least_single, check_weights


@dataclass(frozen=True)
class KineticEnergy:
    """The transport cost of a block (TRGL: Karkar, Ayed, de Bezenac, Gallinari; NeurIPS 2023).

    ``1 / (2 tau) * sum over layers of mean over the batch of || x_out - x_in ||^2``, over those base layers of the
    block whose output has the shape of their input. A step of the minimizing movement scheme: a block that already does
    well leaves the data where they are. The released code takes the residual branch in front of the last ReLU for
    ``x_out - x_in``; here it is the difference that the layer makes, so that it serves layers of any kind.

    Attributes:
        weight: what the cost is multiplied by.
        keep: multiplies the local loss.
        tau: the step size of the scheme; the larger, the freer the blocks.
        average: the mean over the features in the place of the paper's sum. Released code does that: its values of
            tau belong to the mean.
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
        """Return the loss for a block; it has no parameters."""
        return _Transport(self)


class _Transport(ExtraLoss):
    def __init__(self, spec: KineticEnergy) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, sight: Sight) -> Tensor:
        """Return the cost; 0 for a block in which every layer changes the shape."""
        total = at_least_single(sight.activation).new_zeros(())
        for before, after in zip(sight.layers, sight.layers[1:], strict=False):
            if before.shape == after.shape and before.is_floating_point() and after.is_floating_point():
                moved = (at_least_single(after) - at_least_single(before)).square()
                total = total + (moved.mean() if self.spec.average else moved.sum() / moved.shape[0])
        return total / (2 * self.spec.tau)
