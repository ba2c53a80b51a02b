"""1x1 convolution, BatchNorm, ReLU and global average pool as one layer that never stores the wide activation.

SEDONA's heads widen C/4 channels to 512 features and pool them at once. In the first stage of a CIFAR ResNet, with a
batch of 128, the wide activation takes 67 MB against 8 MB for the net's own, and BatchNorm and ReLU would each keep one
for the backward pass. The statistics of ``y = W x`` however follow from those of the narrow input ``x``:
``mean(y) = W mean(x)`` and ``var(y) = diag(W cov(x) W^T)``. With them BatchNorm folds into the convolution, the
examples are no longer coupled, and what remains is :func:`~sedona_fx.heads.pooled_relu.pooled_relu`. The result is
exact up to rounding, first and second derivatives included.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.heads.pooled_relu import pooled_relu


class PointwisePool(nn.Module):
    """``mean over H, W of relu(batch_norm(conv1x1(x)))``: (N, C, H, W) to (N, features).

    `conv` (no bias) and `norm` hold parameters and running statistics as the separate layers would.

    Args:
        channels: C, the channels of the input.
        features: output channels of the convolution.
        norm: a BatchNorm over `features` with affine parameters, running statistics and a momentum.
    """

    def __init__(self, channels: int, features: int, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features (N, features) of `x` (N, C, H, W)."""
        if not self.training:
            # Nothing is kept for a backward pass here, and no operation depends on the batch size, so that this path
            # can be traced.
            return F.relu(self.norm(self.conv(x))).mean((2, 3))
        device_type = x.device.type
        casting = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if casting else nullcontext():
            weight, bias = self._folded(x)
        dtype = torch.get_autocast_dtype(device_type) if casting else self.conv.weight.dtype
        positions = x.flatten(2).transpose(1, 2)
        return pooled_relu(positions.to(dtype), weight.to(dtype), bias.to(dtype))

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (features, C) and bias (features,) of the convolution with BatchNorm folded in."""
        norm, weight = self.norm, self.conv.weight.flatten(1)
        values_per_channel = x.shape[0] * x.shape[2] * x.shape[3]
        if norm.training and values_per_channel > 1:
            x = x.to(weight.dtype)
            center = x.mean((0, 2, 3))
            centered = (x - center[:, None, None]).transpose(0, 1).flatten(1)
            covariance = centered @ centered.t() / values_per_channel
            mean, variance = weight @ center, ((weight @ covariance) * weight).sum(1)
            unbiased = variance.detach() * (values_per_channel / (values_per_channel - 1))
            self._update_running_statistics(mean.detach(), unbiased)
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(variance.clamp_min(0) + norm.eps)
        return scale[:, None] * weight, norm.bias - scale * mean

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
