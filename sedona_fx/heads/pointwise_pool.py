"""1x1 convolution, BatchNorm, ReLU, global average pool, as one layer that never holds the wide activation.

SEDONA's heads widen C/4 channels to 512 and pool at once. On a CIFAR ResNet's first stage that activation is 67 MB for
a batch of 128, against 8 MB of the net's own, and BatchNorm and ReLU would each keep one for backward. But the
statistics of ``y = W x`` follow from those of the narrow ``x``: ``mean(y) = W mean(x)``, ``var(y) = diag(W cov(x)
W^T)``. With them BatchNorm folds into the convolution, nothing couples the examples any more, and what is left is
:func:`~sedona_fx.heads.pooled_relu.pooled_relu`. Exact up to rounding, first and second derivatives included.
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
    """

    def __init__(self, channels: int, features: int, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features."""
        if not self.training:  # nothing to keep, and nothing that depends on the size of the batch: this can be traced
            return F.relu(self.norm(self.conv(x))).mean((2, 3))
        kind = x.device.type
        casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if casting else nullcontext():
            weight, bias = self._folded(x)
        dtype = torch.get_autocast_dtype(kind) if casting else self.conv.weight.dtype
        places = x.flatten(2).transpose(1, 2)
        return pooled_relu(places.to(dtype), weight.to(dtype), bias.to(dtype))

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (features, C) and bias (features,) of the convolution with BatchNorm folded in."""
        norm, weight = self.norm, self.conv.weight.flatten(1)
        values = x.shape[0] * x.shape[2] * x.shape[3]
        if norm.training and values > 1:
            wide = x.to(weight.dtype)
            center = wide.mean((0, 2, 3))
            centered = (wide - center[:, None, None]).transpose(0, 1).flatten(1)
            covariance = centered @ centered.t() / values
            mean, variance = weight @ center, ((weight @ covariance) * weight).sum(1)
            self._track(mean.detach(), variance.detach() * (values / (values - 1)))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean, norm.running_var
        scale = norm.weight * torch.rsqrt(variance.clamp_min(0) + norm.eps)
        return scale[:, None] * weight, norm.bias - scale * mean

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
