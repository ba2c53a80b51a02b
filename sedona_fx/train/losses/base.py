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
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sedona_fx.errors import DataError, ScheduleError, shape_text

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NO_DIRECTION = 1e-8  # a row shorter than this has no cosine: all features equal, as behind dead units


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


@dataclass(frozen=True)
class PredSim:
    """Similarity matching (Nokland, Eidnes; ICML 2019): examples of one class shall have similar activations.

    ``L_sim = || S(NN(H)) - S(Y) ||_F^2``: S is the matrix of the cosines between all pairs of examples of a batch, each
    example's features centred around their own mean. NN is a trained 3x3 convolution without bias that keeps size and
    channels, then the standard deviation of each channel over space; a linear layer without bias for vectors. As in the
    authors' released code, maps of up to 3 channels, or of one position, are compared whole: a standard deviation would
    leave too little. Y are the one-hot targets; soft or dense targets in floating point are taken as they are.

    Attributes:
        weight: beta in the paper, 0.99 there.
        keep: multiplies the local loss; the paper has ``1 - weight``.
        average: the mean over the N x N entries in the place of the paper's sum, so that the loss does not grow with
            the batch. Released code does that: the paper's beta belongs to the mean.
        channel_dim: where the activation has its channels; -1 for tokens (N, T, D).
    """

    weight: float = 0.99
    keep: float = 1.0
    average: bool = True
    channel_dim: int = 1
    needs_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self)

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return the loss for a block.

        Raises:
            ScheduleError: the activation is neither a vector, nor maps of one to three dimensions.
        """
        return _Similarity(self, activation, classes)


class _Similarity(ExtraLoss):
    def __init__(self, spec: PredSim, activation: Tensor, classes: int) -> None:
        super().__init__()
        positions = activation.dim() - 2
        if not activation.is_floating_point() or positions not in (0, *_CONVS):
            raise ScheduleError(
                "PredSim compares vectors (N, C) and maps (N, C, ...) of up to three dimensions; a block's output is "
                f"{shape_text(activation.shape)} {activation.dtype}. Leave it out, or write an extra loss of your own."
            )
        self.spec, self.classes = spec, classes
        channels = channel_count(spec, activation)
        if positions:
            self.net: nn.Module = _CONVS[positions](channels, channels, 3, padding=1, bias=False)
        else:
            self.net = nn.Linear(channels, channels, bias=False)
        self.net.to(activation.device, activation.dtype)

    def forward(self, sight: Sight) -> Tensor:
        """Return the squared distance of the two similarity matrices."""
        maps = self.net(sight.activation.movedim(self.spec.channel_dim, 1))
        with torch.autocast(maps.device.type, enabled=False):
            maps = at_least_single(maps)
            whole = maps.shape[1] <= 3 or math.prod(maps.shape[2:]) == 1
            features = maps.flatten(1) if whole else maps.flatten(2).std(2)
            squares = (_similarity(features) - _similarity(self._rows(sight.target, features))).square()
            return squares.mean() if self.spec.average else squares.sum()

    def _rows(self, target: Any, like: Tensor) -> Tensor:
        """Return the targets as one row an example."""
        if isinstance(target, Tensor):
            target = target.to(like.device)
            if target.is_floating_point() and target.dim() > 1 and target[0:1].numel() > 1:
                return target.detach().flatten(1).to(like.dtype)
            if not target.is_floating_point() and target.dim() == 1:
                return (target[:, None] == torch.arange(self.classes, device=like.device)).to(like.dtype)
        got = f"{shape_text(target.shape)} {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise DataError(
            "PredSim compares examples by their targets: one class an example (N,), or at least two numbers an example "
            f"in floating point (N, ...). This target is {got}."
        )


def _similarity(rows: Tensor) -> Tensor:
    """Return the cosines between all pairs of rows, each centred; 0 for a row without a direction."""
    centred = rows - rows.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    unit = centred / norm.masked_fill(norm <= _NO_DIRECTION, math.inf)  # such a row gets no gradient either
    return unit @ unit.t()


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
