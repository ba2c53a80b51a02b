"""The nets behind the built-in auxiliary heads. Plain functions that return an `nn.Sequential`; `heads` names them.

A spatial head takes (N, C, H, W), or (N, C, L), (N, C, T, H, W), or (N, C) where `vector` is set, and gives class
scores (N, classes). `size` is the (H, W), (L,) or (T, H, W) it is laid out for, and its length the number of spatial
dimensions; other sizes run too, with the same layers. A token head has its channels in `channel_dim` of `rank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sedona_fx.heads.pointwise_pool import PointwisePool

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


def sedona_head(
    channels: int,
    size: tuple[int, ...],
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
    :class:`~sedona_fx.heads.pointwise_pool.PointwisePool`: the same numbers in a fraction of the memory.
    """
    dims = len(size)
    planes = max(1, channels // expansion)
    growth = max(1, planes // 2) if expansion > 1 else planes
    layers = [*_spatial_input(channels, vector), *_conv_bn_relu(channels, planes, dims=dims)]
    layers += _conv_bn_relu(planes, planes, kernel=3, stride=2, groups=planes, dims=dims)
    side = math.ceil(max(size) / 2)  # the longer side: striding over a side of 1 leaves it at 1
    for position in range(depth - 1):
        stride = 2 if position % 2 == 1 and side >= 2 else 1
        outgoing = planes + growth if stride == 2 else planes
        layers.append(InvertedResidual(planes, outgoing, stride, expansion, dims))
        planes, side = outgoing, math.ceil(side / stride)
    if dims != 2:  # the pool is over H and W, and does not mind their shape: (N, C, L, 1)
        layers += [nn.Flatten(2), nn.Unflatten(2, (-1, 1))]
    layers += [PointwisePool(planes, features, HeadBatchNorm(features)), nn.Linear(features, classes)]
    return _initialised(layers)


def mlp_head(
    channels: int, size: tuple[int, ...], classes: int, *, spatial: int = 0, vector: bool = False
) -> nn.Sequential:
    """Return DGL's `mlp` head, or with ``spatial=3`` its `mlp-sr` head (Belilovsky et al., ICML 2020).

    Pool to a quarter of each side (rounded up), `spatial` 1x1 convolutions, pool to 2x2, three linear layers of 4C (2C
    for one spatial dimension, 8C for three), linear. Maps of 4x4 and less are 1x1 by then and the second pool repeats
    the one value four times: so does DGL. As there, the linear layers have a bias although BatchNorm follows.
    """
    dims = len(size)
    width = 2**dims * channels
    layers = [*_spatial_input(channels, vector), _POOLS[dims](tuple(math.ceil(side / 4) for side in size))]
    for _ in range(spatial):
        layers += _conv_bn_relu(channels, channels, dims=dims)
    layers += [_POOLS[dims](2), nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(width, width), HeadBatchNorm(width), nn.ReLU()]
    layers.append(nn.Linear(width, classes))
    return _initialised(layers)


def cnn_head(channels: int, size: tuple[int, ...], classes: int, *, vector: bool = False) -> nn.Sequential:
    """Return DGL's `cnn` head (Belilovsky et al., ICML 2020), the same for every `size`.

    Two 3x3 convolutions at full size, pool to 2x2, BatchNorm, linear.
    """
    dims = len(size)
    layers = _spatial_input(channels, vector)
    for _ in range(2):
        layers += _conv_bn_relu(channels, channels, kernel=3, dims=dims)
    layers += [_POOLS[dims](2), HeadBatchNorm(channels), nn.Flatten(), nn.Linear(2**dims * channels, classes)]
    return _initialised(layers)


def linear_head(channels: int, classes: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return the mean over all dimensions but the batch and `channel_dim`, then a linear layer. Any rank from 2 on."""
    others = tuple(dim for dim in range(1, rank) if dim != channel_dim)
    return _initialised([*([Mean(others)] if others else []), nn.Linear(channels, classes)])


def token_head(
    channels: int,
    classes: int,
    depth: int,
    *,
    channel_dim: int,
    rank: int,
    token: int | None = None,
    attention: bool = False,
) -> nn.Sequential:
    """Return LayerNorm over features, ``depth - 1`` residual MLPs, a pool over tokens, linear. Any rank from 2 on.

    The pool is the mean, or :class:`AttentionPool`, or the one token `token` of (N, T, D). That one is taken first:
    the layers before the pool treat each token by itself, so the others would be computed in vain.

    SEDONA has no heads for tokens: this is its ladder of depths, built of the transformer's own parts (our choice).
    """
    if token is not None:
        return _initialised([Token(token), *_per_token(channels, depth, 1, 2), nn.Linear(channels, classes)])
    layers = _per_token(channels, depth, channel_dim, rank)
    if rank > 2:
        layers.append(AttentionPool(channels) if attention else Mean(tuple(range(1, rank - 1))))
    return _initialised([*layers, nn.Linear(channels, classes)])


def logits_head(channels: int, vocabulary: int, depth: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return LayerNorm over features, ``depth - 1`` residual MLPs, linear, all token by token: (N, T, D) to (N, T, V).

    Serves any number of tokens and any rank from 3 on: all dimensions but the channels' are kept, channels come last.
    """
    return _initialised([*_per_token(channels, depth, channel_dim, rank), nn.Linear(channels, vocabulary)])


def dense_head(
    channels: int,
    maps: int,
    depth: int,
    *,
    dims: int = 2,
    before: Sequence[nn.Module] = (),
    after: Sequence[nn.Module] = (),
) -> nn.Sequential:
    """Return a small fully convolutional head over `dims` dimensions: (N, C, H, W) to (N, maps, H, W).

    1x1 convolution to C/4, ``depth - 1`` 3x3 convolutions, each with BatchNorm and ReLU, 1x1 convolution to `maps`. A
    quarter of the channels as in torchvision's ``FCNHead``, but no fewer than 16 where there are as many: the first
    levels of a U-Net have few. `before` lays the activation out as maps, `after` resizes them: last, as they are few.
    """
    width = max(channels // 4, min(channels, 16))
    layers = [*before, *_conv_bn_relu(channels, width, dims=dims)]
    for _ in range(depth - 1):
        layers += _conv_bn_relu(width, width, kernel=3, dims=dims)
    return _initialised([*layers, _CONVS[dims](width, maps, 1), *after])


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
    depthwise, 1x1 convolution without activation; the input is added where the shapes agree. Over `dims` dimensions.
    """

    def __init__(self, channels: int, outgoing: int, stride: int, expansion: int, dims: int = 2) -> None:
        super().__init__()
        hidden = channels * expansion
        layers = _conv_bn_relu(channels, hidden, dims=dims) if expansion > 1 else []
        layers += _conv_bn_relu(hidden, hidden, kernel=3, stride=stride, groups=hidden, dims=dims)
        layers += [_CONVS[dims](hidden, outgoing, 1, bias=False), HeadBatchNorm(outgoing)]
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


class AttentionPool(nn.Module):
    """Mean over all tokens weighted by ``softmax(query . token / sqrt(D))``: (N, ..., D) to (N, D).

    One learned query and the tokens themselves for keys and values. It starts at 0, as the plain mean.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled tokens."""
        tokens = x.flatten(1, -2)
        # Written out: PyTorch's fused attention has no second derivative, which a search may want.
        weights = (tokens @ self.query * self.query.shape[0] ** -0.5).softmax(1)
        return (weights.unsqueeze(1) @ tokens).squeeze(1)


class Token(nn.Module):
    """Token `index` of (N, T, D), as (N, D)."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return x[:, index]."""
        return x.select(1, self.index)


class MoveDim(nn.Module):
    """Move dimension `source` to `destination`."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x with one dimension moved."""
        return x.movedim(self.source, self.destination)


def _spatial_input(channels: int, vector: bool) -> list[nn.Module]:
    # Decided when the head is built: a test of x.dim() in forward could not be traced.
    return [nn.Unflatten(1, (channels, 1, 1))] if vector else []


def _per_token(channels: int, depth: int, channel_dim: int, rank: int) -> list[nn.Module]:
    moved = [MoveDim(channel_dim, -1)] if channel_dim != rank - 1 else []
    return [*moved, nn.LayerNorm(channels), *(ResidualMLP(channels) for _ in range(depth - 1))]


def _conv_bn_relu(
    channels: int, outgoing: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, dims: int = 2
) -> list[nn.Module]:
    # ReLU is not in place: it saves no memory behind BatchNorm, which keeps its input and not its output.
    conv = _CONVS[dims](channels, outgoing, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, HeadBatchNorm(outgoing), nn.ReLU()]


def _initialised(layers: list[nn.Module]) -> nn.Sequential:
    """Return the head with Kaiming-normal weights (fan-in; factor 1 for the output layer) and biases of 0."""
    head = nn.Sequential(*layers)
    weighted = [m for m in head.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    for module in weighted:
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is weighted[-1] else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return head
