"""Extra losses, to be added to the local ones: ``Greedy(net, optimizer, extra=[PredSim(0.99, keep=0.01)])``.

A block then minimises ``keep * (its local loss) + weight * (the extra loss)``. With several extra losses, the local
loss is multiplied by the product of their `keep`, and all of them are added. PredSim's ``(1 - beta) * prediction + beta
* similarity`` is ``PredSim(weight=beta, keep=1 - beta)``.

| extra loss | what it asks of a block | which blocks |
|---|---|---|
| :class:`~sedona_fx.train.PredSim` | examples of one class have similar activations | all but the last |
| :class:`~sedona_fx.train.InfoPro` | the input can still be reconstructed from the activation | all but the last |
| :class:`~sedona_fx.train.KineticEnergy` | its layers change the activations as little as they can | all |

To write an extra loss of your own, write a class with what :class:`Extra` lists; its ``build`` returns an
:class:`ExtraLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sedona_fx.errors import ScheduleError, shape_text


@dataclass(frozen=True)
class Sight:
    """What an extra loss may look at, for one block and one batch.

    Attributes:
        activation: the block's output, with its graph: what the block's head reads, the batch first. In the last
            block, the output of its last base layer.
        layers: the activation that enters the block, and the output of each of its base layers, with their graph; empty
            for losses without `needs_layers`.
        inputs: the net's inputs by argument name.
        target: the target of the batch.
    """

    activation: Tensor
    layers: tuple[Tensor, ...]
    inputs: Mapping[str, Any]
    target: Any


class ExtraLoss(nn.Module):
    """An extra loss of one block; its parameters, if it has any, are trained by the block's optimizer."""

    def forward(self, sight: Sight) -> Tensor:
        """Return the loss, a scalar, without its weight."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes")


class Extra(Protocol):
    """What ``extra=[...]`` of a schedule takes: an extra loss's settings, and how to make it for a block.

    An attribute `keep` in [0, 1], 1 where there is none, multiplies the block's own local loss.
    """

    @property
    def weight(self) -> float:
        """Factor of the loss."""

    @property
    def needs_layers(self) -> bool:
        """Whether the loss looks at ``Sight.layers``."""

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return a new module ``Sight -> scalar`` for a block.

        Args:
            activation: an example of the block's output: shape, dtype and device. For the last block, a tensor without
                dimensions.
            inputs: an example of the net's inputs, by argument name.
            classes: size of dimension 1 of the model's primary output; 1 where there is no such dimension.
        """


def check_weights(extra: Any) -> None:
    """Check the `weight` and `keep` of an extra loss.

    Raises:
        ScheduleError: one is out of range.
    """
    name = type(extra).__name__
    if not (math.isfinite(extra.weight) and extra.weight >= 0):
        raise ScheduleError(f"{name}(weight={extra.weight}) must be a number of 0 or more.")
    if not 0 <= extra.keep <= 1:
        raise ScheduleError(f"{name}(keep={extra.keep}) must be in [0, 1]: it multiplies the block's own local loss.")


def channel_count(extra: Any, activation: Tensor) -> int:
    """Return the number of channels of an activation.

    Args:
        extra: an extra loss; its `channel_dim` says which dimension holds the channels.
        activation: an example, with any number of dimensions.

    Raises:
        ScheduleError: the activation has no such dimension.
    """
    if not -activation.dim() < extra.channel_dim < activation.dim() or extra.channel_dim == 0:
        raise ScheduleError(
            f"{type(extra).__name__}(channel_dim={extra.channel_dim}) is no dimension of channels of a block's output "
            f"{shape_text(activation.shape)}. It is 1 in (N, C, ...), -1 in tokens (N, T, D) and (N, H, W, C)."
        )
    return activation.shape[extra.channel_dim]


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: in half precision, sums of squares overflow and underflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
