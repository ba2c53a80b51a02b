"""PredSim: a block's activations are as similar as the targets are (Nokland, Eidnes; ICML 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sedona_fx.errors import DataError, ScheduleError, shape_text
from sedona_fx.train.losses.base import ExtraLoss, Sight, at_least_single, channel_count, check_weights

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NO_DIRECTION = (
    1e-8  # a centred row shorter than this has no cosine: all its features are equal, as those of dead units
)


@dataclass(frozen=True)
class PredSim:
    """Similarity matching (Nokland, Eidnes; ICML 2019): examples of one class should have similar activations.

    ``L_sim = || S(NN(H)) - S(Y) ||_F^2``, where S is the matrix of the cosines between all pairs of examples of a
    batch, each example's features centred around their own mean. NN is a trained 3x3 convolution without bias that
    keeps size and channels, followed by the standard deviation of each channel over space; for vectors, it is a linear
    layer without bias. As in the authors' released code, the output of the convolution is compared as it is if maps
    have up to 3 channels or one position: standard deviations would leave too few features. Y are the one-hot targets;
    soft or dense targets in floating point are used as they are.

    Attributes:
        weight: factor of the loss; beta in the paper, 0.99 there.
        keep: factor of the local loss; ``1 - weight`` in the paper.
        average: take the mean over the N x N entries instead of the paper's sum, so that the loss does not grow with
            the batch. The released code does that: the paper's beta is for the mean.
        channel_dim: the dimension of channels of the activation; -1 for tokens (N, T, D).

    Raises:
        ScheduleError: a setting is out of range.
    """

    weight: float = 0.99
    keep: float = 1.0
    average: bool = True
    channel_dim: int = 1
    needs_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self)

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return the loss of a block.

        Raises:
            ScheduleError: the activation is neither vectors (N, C) nor maps (N, C, ...) of one to three dimensions.
        """
        return _Similarity(self, activation, classes)


class _Similarity(ExtraLoss):
    def __init__(self, settings: PredSim, activation: Tensor, classes: int) -> None:
        super().__init__()
        positions = activation.dim() - 2
        if not activation.is_floating_point() or positions not in (0, *_CONVS):
            raise ScheduleError(
                "PredSim compares vectors (N, C) and maps (N, C, ...) of up to three dimensions; a block's output is "
                f"{shape_text(activation.shape)} {activation.dtype}. Leave it out, or write an extra loss of your own."
            )
        self.settings, self.classes = settings, classes
        channels = channel_count(settings, activation)
        if positions:
            self.net: nn.Module = _CONVS[positions](channels, channels, 3, padding=1, bias=False)
        else:
            self.net = nn.Linear(channels, channels, bias=False)
        self.net.to(activation.device, activation.dtype)

    def forward(self, sight: Sight) -> Tensor:
        """Return the squared distance of the two similarity matrices, a scalar."""
        maps = self.net(sight.activation.movedim(self.settings.channel_dim, 1))
        with torch.autocast(maps.device.type, enabled=False):
            maps = at_least_single(maps)
            few_features = maps.shape[1] <= 3 or math.prod(maps.shape[2:]) == 1
            features = maps.flatten(1) if few_features else maps.flatten(2).std(2)
            squares = (_similarity(features) - _similarity(self._rows(sight.target, features))).square()
            return squares.mean() if self.settings.average else squares.sum()

    def _rows(self, target: Any, like: Tensor) -> Tensor:
        """Return the targets as one row per example, (N, classes or numbers), in the dtype of `like`."""
        if isinstance(target, Tensor):
            target = target.to(like.device)
            if target.is_floating_point() and target.dim() > 1 and target[0:1].numel() > 1:
                return target.detach().flatten(1).to(like.dtype)
            if not target.is_floating_point() and target.dim() == 1:
                return (target[:, None] == torch.arange(self.classes, device=like.device)).to(like.dtype)
        kind = f"{shape_text(target.shape)} {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise DataError(
            "PredSim compares examples by their targets: one class an example (N,), or at least two numbers an example "
            f"in floating point (N, ...). This target is {kind}."
        )


def _similarity(rows: Tensor) -> Tensor:
    """Return the cosines between all pairs of centred rows, (N, N); 0 for a row without a direction."""
    centred = rows - rows.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    unit = centred / norm.masked_fill(norm <= _NO_DIRECTION, math.inf)  # such a row gets no gradient
    return unit @ unit.t()
