"""The nets behind the built-in auxiliary heads. Plain functions that return an `nn.Sequential`; `heads` names them.

An image head takes (N, C, H, W), or (N, C) where `vector` is set, and gives class scores (N, classes). `size` is the
(H, W) it is laid out for; other sizes run too, with the same layers.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sedona_fx.pointwise_pool import PointwisePool


def sedona_head(
    channels: int,
    size: tuple[int, int],
    classes: int,
    depth: int,
    *,
    expansion: int = 4,
    features: int = 512,
    vector: bool = False,
) -> nn.Sequential:
    """Return SEDONA's candidate head of `depth` 1 to 4 (Pyeon et al., ICLR 2021).

    1x1 convolution to C/expansion, 3x3 depthwise with stride 2, ``depth - 1`` inverted residuals, 1x1 convolution to
    `features`, global average pool, linear. Every second inverted residual strides and widens while the map is at
    least 2 wide: by C/8, or by C with expansion 1 (the ResNet-18 and -34 form), as in the authors' released
    settings. Divisions round down, to no less than 1. The last convolution, its BatchNorm and ReLU and the pool are one
    :class:`~sedona_fx.pointwise_pool.PointwisePool`: the same numbers in a fraction of the memory.
    """
    planes = max(1, channels // expansion)
    growth = max(1, planes // 2) if expansion > 1 else planes
    layers = [*_image_input(channels, vector), *_conv_bn_relu(channels, planes)]
    layers += _conv_bn_relu(planes, planes, kernel=3, stride=2, groups=planes)
    side = math.ceil(max(size) / 2)  # the longer side: striding over a side of 1 leaves it at 1
    for position in range(depth - 1):
        stride = 2 if position % 2 == 1 and side >= 2 else 1
        outgoing = planes + growth if stride == 2 else planes
        layers.append(InvertedResidual(planes, outgoing, stride, expansion))
        planes, side = outgoing, math.ceil(side / stride)
    layers += [PointwisePool(planes, features, HeadBatchNorm(features)), nn.Linear(features, classes)]
    return _initialised(layers)


def mlp_head(
    channels: int, size: tuple[int, int], classes: int, *, spatial: int = 0, vector: bool = False
) -> nn.Sequential:
    """Return DGL's `mlp` head, or with ``spatial=3`` its `mlp-sr` head (Belilovsky et al., ICML 2020).

    Pool to a quarter of each side (rounded up), `spatial` 1x1 convolutions, pool to 2x2, three linear layers of 4C,
    linear. Maps of 4x4 and less are 1x1 by then and the second pool repeats the one value four times: so does DGL.
    As there, the linear layers have a bias although BatchNorm follows.
    """
    quarter = (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    layers = [*_image_input(channels, vector), nn.AdaptiveAvgPool2d(quarter)]
    for _ in range(spatial):
        layers += _conv_bn_relu(channels, channels)
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(4 * channels, 4 * channels), HeadBatchNorm(4 * channels), nn.ReLU()]
    layers.append(nn.Linear(4 * channels, classes))
    return _initialised(layers)


def cnn_head(channels: int, size: tuple[int, int], classes: int, *, vector: bool = False) -> nn.Sequential:
    """Return DGL's `cnn` head (Belilovsky et al., ICML 2020), the same for every `size`.

    Two 3x3 convolutions at full size, pool to 2x2, BatchNorm, linear.
    """
    layers = _image_input(channels, vector)
    for _ in range(2):
        layers += _conv_bn_relu(channels, channels, kernel=3)
    layers += [nn.AdaptiveAvgPool2d(2), HeadBatchNorm(channels), nn.Flatten(), nn.Linear(4 * channels, classes)]
    return _initialised(layers)


def linear_head(channels: int, classes: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return the mean over all dimensions but the batch and `channel_dim`, then a linear layer. Any rank from 2 on."""
    others = tuple(dim for dim in range(1, rank) if dim != channel_dim)
    return _initialised([*([Mean(others)] if others else []), nn.Linear(channels, classes)])


def token_head(channels: int, classes: int, depth: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return LayerNorm over features, ``depth - 1`` residual MLPs, mean over tokens, linear. Any rank from 2 on.

    SEDONA has no heads for tokens: this is its ladder of depths, built of the transformer's own parts (our choice).
    """
    layers: list[nn.Module] = [] if channel_dim == rank - 1 else [ChannelsLast(channel_dim)]
    layers.append(nn.LayerNorm(channels))
    layers += [ResidualMLP(channels) for _ in range(depth - 1)]
    if rank > 2:
        layers.append(Mean(tuple(range(1, rank - 1))))
    layers.append(nn.Linear(channels, classes))
    return _initialised(layers)


class HeadBatchNorm(_BatchNorm):
    """BatchNorm over (N, C) or (N, C, ...) that also takes one value a channel.

    A last batch of one, pooled to 1x1, has no variance: PyTorch raises there. Here such a batch is normalised with the
    running statistics, in training too, and leaves them as they are: one value says nothing about a variance.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every rank: the built-in ones take one each."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, same shape."""
        # Shapes only, so no device has to be waited for.
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, table 1) with ReLU in place of ReLU6, as SEDONA has it.

    (N, C, H, W) to (N, outgoing, H/stride, W/stride): 1x1 convolution to expansion * C (left out when that is C), 3x3
    depthwise, 1x1 convolution without activation; the input is added where the shapes agree.
    """

    def __init__(self, channels: int, outgoing: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers = _conv_bn_relu(channels, hidden) if expansion > 1 else []
        layers += _conv_bn_relu(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        layers += [nn.Conv2d(hidden, outgoing, 1, bias=False), HeadBatchNorm(outgoing)]
        self.branch = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == outgoing

    def forward(self, x: Tensor) -> Tensor:
        """Return branch(x), plus x where the shapes agree."""
        out: Tensor = self.branch(x)
        return x + out if self.residual else out


class ResidualMLP(nn.Module):
    """Pre-norm residual MLP on the last dimension, shape kept: x + linear(gelu(linear(norm(x)))).

    The hidden width is the number of features and not four times it: a head should cost a fraction of a transformer
    block (2 D^2 multiplications a token here, 12 D^2 there).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear1 = nn.Linear(features, features)
        self.linear2 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + MLP(x)."""
        out: Tensor = self.linear2(F.gelu(self.linear1(self.norm(x))))
        return x + out


class Mean(nn.Module):
    """Mean over the dimensions `dims`, which are dropped."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return x.mean(dims)."""
        return x.mean(dim=self.dims)

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dims={self.dims}"


class ChannelsLast(nn.Module):
    """Move dimension `channel_dim` to the end."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x with its channels last."""
        return x.movedim(self.channel_dim, -1)

    def extra_repr(self) -> str:
        """Show the dimension moved."""
        return f"channel_dim={self.channel_dim}"


def _image_input(channels: int, vector: bool) -> list[nn.Module]:
    # Decided when the head is built: a test of x.dim() in forward could not be traced.
    return [nn.Unflatten(1, (channels, 1, 1))] if vector else []


def _conv_bn_relu(
    channels: int, outgoing: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    # ReLU is not in place: it saves no memory behind BatchNorm, which keeps its input and not its output.
    conv = nn.Conv2d(channels, outgoing, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, HeadBatchNorm(outgoing), nn.ReLU()]


def _initialised(layers: list[nn.Module]) -> nn.Sequential:
    """Return the head with Kaiming-normal weights (fan-in; factor 1 for the output layer) and biases of 0."""
    head = nn.Sequential(*layers)
    for module in head.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is layers[-1] else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return head
