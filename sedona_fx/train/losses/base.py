"""Losses that a user may add to the local ones: ``Greedy(net, optimizer, extra=[PredSim(0.99, keep=0.01)])``.

A block then follows ``keep * (its local loss) + weight * (the extra loss)``; with several extra losses the local loss
is multiplied by the product of their `keep`, and all of them are added. PredSim's ``(1 - beta) * prediction + beta *
similarity`` is ``PredSim(weight=beta, keep=1 - beta)``.

| extra loss | what a block is asked for | where |
|---|---|---|
| :class:`PredSim` | examples of one class look alike | behind every block that has a head |
| :class:`~sedona_fx.train.losses.infopro.InfoPro` | the input can still be read from the activation | the same |
| :class:`KineticEnergy` | its layers move the data as little as they can | in every block |
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
        activation: the block's output, with its graph: what the block's head reads.
        layers: the activation that enters the block, and the value behind each of its base layers, with their graph;
            empty for losses without `needs_layers`.
        inputs: the net's inputs by argument name.
        target: the target of the batch.
    """

    activation: Tensor
    layers: tuple[Tensor, ...]
    inputs: Mapping[str, Any]
    target: Any


class ExtraLoss(nn.Module):
    """An extra loss of one block; its parameters, if it has any, are stepped by the block's optimizer."""

    def forward(self, sight: Sight) -> Tensor:
        """Return a scalar, not yet weighted."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes")


class Extra(Protocol):
    """What a user hands in: the weight of an extra loss, and how to make it for a block.

    An attribute `keep` in [0, 1], 1 where there is none, multiplies the block's own local loss.
    """

    @property
    def weight(self) -> float:
        """What the loss is multiplied by."""

    @property
    def needs_layers(self) -> bool:
        """Whether it looks at ``Sight.layers``."""

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return a new module ``Sight -> scalar`` for a block.

        Args:
            activation: an example of the block's output: shape, dtype and device.
            inputs: an example of the net's inputs, by argument name.
            classes: size of dimension 1 of the model's primary output.
        """


def check_weights(extra: Any) -> None:
    """Raise if the `weight` or `keep` of an extra loss is none."""
    name = type(extra).__name__
    if not (math.isfinite(extra.weight) and extra.weight >= 0):
        raise ScheduleError(f"{name}(weight={extra.weight}) must be a number of 0 or more.")
    if not 0 <= extra.keep <= 1:
        raise ScheduleError(f"{name}(keep={extra.keep}) must be in [0, 1]: it multiplies the block's own local loss.")


def channel_count(extra: Any, activation: Tensor) -> int:
    """Return how many channels an activation has.

    Raises:
        ScheduleError: it has no such dimension as the extra loss says.
    """
    if not -activation.dim() < extra.channel_dim < activation.dim() or extra.channel_dim == 0:
        raise ScheduleError(
            f"{type(extra).__name__}(channel_dim={extra.channel_dim}) is no dimension of channels of a block's output "
            f"{shape_text(activation.shape)}. It is 1 in (N, C, ...), -1 in tokens (N, T, D) and (N, H, W, C)."
        )
    return activation.shape[extra.channel_dim]


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision or better: sums of squares overflow and fade in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
