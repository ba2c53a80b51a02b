"""The nets of the built-in auxiliary heads: plain functions that return an `nn.Sequential`.

:mod:`sedona_fx.heads.fit` derives their arguments from a context and gives them their names.

A spatial head maps (N, C, H, W), (N, C, L) or (N, C, T, H, W), or (N, C) if `vector` is set, to class scores
(N, classes). Its `size` is the (H, W), (L,) or (T, H, W) that it is designed for, and the length of `size` is the
number of spatial dimensions; inputs of other sizes run too, through the same layers. A token head reads an activation
of `rank` dimensions whose features are in dimension `channel_dim`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from sedona_fx.heads.layers import (
    CONVS,
    AttentionPool,
    HeadBatchNorm,
    InvertedResidual,
    Mean,
    MoveDim,
    Resample,
    ResidualMLP,
    Token,
    conv_bn_relu,
)
from sedona_fx.heads.pointwise_pool import PointwisePool

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
    """Return SEDONA's candidate head (Pyeon et al., ICLR 2021).

    1x1 convolution to C/expansion, 3x3 depthwise convolution with stride 2, ``depth - 1`` inverted residuals, 1x1
    convolution to `features`, global average pool, linear. Every second inverted residual strides and widens while the
    map is at least 2 wide: by C/8, or by C with expansion 1 (the form for ResNet-18 and -34), as in the authors'
    released settings. Divisions round down, to no less than 1. The last convolution, its BatchNorm and ReLU and the
    pool are one :class:`~sedona_fx.heads.pointwise_pool.PointwisePool`: the same numbers in a fraction of the memory.

    Args:
        channels: C.
        size: spatial size of the activation.
        classes: number of scores.
        depth: 1 to 4.
        expansion: of the inverted residuals; C/expansion is the width of the first convolutions.
        features: width of the last convolution.
        vector: whether the activation is (N, C).
    """
    dims = len(size)
    planes = max(1, channels // expansion)
    growth = max(1, planes // 2) if expansion > 1 else planes
    layers = [*_spatial_input(channels, vector), *conv_bn_relu(channels, planes, dims=dims)]
    layers += conv_bn_relu(planes, planes, kernel=3, stride=2, groups=planes, dims=dims)
    side = math.ceil(max(size) / 2)  # the longer side: a stride leaves a side of 1 at 1
    for position in range(depth - 1):
        stride = 2 if position % 2 == 1 and side >= 2 else 1
        outgoing = planes + growth if stride == 2 else planes
        layers.append(InvertedResidual(planes, outgoing, stride, expansion, dims))
        planes, side = outgoing, math.ceil(side / stride)
    if dims != 2:  # the pool averages over H and W, whatever their sizes: (N, C, L, 1)
        layers += [nn.Flatten(2), nn.Unflatten(2, (-1, 1))]
    layers += [PointwisePool(planes, features, HeadBatchNorm(features)), nn.Linear(features, classes)]
    return _initialised(layers)


def mlp_head(
    channels: int, size: tuple[int, ...], classes: int, *, spatial: int = 0, vector: bool = False
) -> nn.Sequential:
    """Return DGL's `mlp` head, or with ``spatial=3`` its `mlp-sr` head (Belilovsky et al., ICML 2020).

    Pool to a quarter of each side (rounded up), `spatial` 1x1 convolutions, pool to 2x2, three linear layers of 4C (2C
    for one spatial dimension, 8C for three), linear. Maps of 4x4 and smaller are 1x1 after the first pool, and the
    second pool repeats that value four times, as in DGL. As there, the linear layers have a bias although BatchNorm
    follows.
    """
    dims = len(size)
    width = 2**dims * channels
    layers = [*_spatial_input(channels, vector), _POOLS[dims](tuple(math.ceil(side / 4) for side in size))]
    for _ in range(spatial):
        layers += conv_bn_relu(channels, channels, dims=dims)
    layers += [_POOLS[dims](2), nn.Flatten()]
    for _ in range(3):
        layers += [nn.Linear(width, width), HeadBatchNorm(width), nn.ReLU()]
    layers.append(nn.Linear(width, classes))
    return _initialised(layers)


def cnn_head(channels: int, size: tuple[int, ...], classes: int, *, vector: bool = False) -> nn.Sequential:
    """Return DGL's `cnn` head (Belilovsky et al., ICML 2020), which is the same for every `size` of one length.

    Two 3x3 convolutions at full size, pool to 2x2, BatchNorm, linear.
    """
    dims = len(size)
    layers = _spatial_input(channels, vector)
    for _ in range(2):
        layers += conv_bn_relu(channels, channels, kernel=3, dims=dims)
    layers += [_POOLS[dims](2), HeadBatchNorm(channels), nn.Flatten(), nn.Linear(2**dims * channels, classes)]
    return _initialised(layers)


def linear_head(channels: int, classes: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return the mean over all dimensions but the batch and `channel_dim`, then a linear layer, for any rank from 2."""
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
    """Return LayerNorm over features, ``depth - 1`` residual MLPs, a pool over tokens, linear, for any rank from 2.

    SEDONA has no heads for tokens: this is its ladder of depths, built of the transformer's own parts (our choice).

    Args:
        channels: D, the number of features.
        classes: number of scores.
        depth: 1 or more.
        channel_dim: dimension of the features, not negative.
        rank: number of dimensions of the activation.
        token: pool by taking this one token of (N, T, D). It is taken first: the layers before the pool treat each
            token by itself, so the others would be computed for nothing.
        attention: pool by :class:`~sedona_fx.heads.layers.AttentionPool` instead of the mean.
    """
    if token is not None:
        layers = [Token(token), *_per_token(channels, depth, channel_dim=1, rank=2)]
        return _initialised([*layers, nn.Linear(channels, classes)])
    layers = _per_token(channels, depth, channel_dim=channel_dim, rank=rank)
    if rank > 2:
        layers.append(AttentionPool(channels) if attention else Mean(tuple(range(1, rank - 1))))
    return _initialised([*layers, nn.Linear(channels, classes)])


def logits_head(channels: int, vocabulary: int, depth: int, *, channel_dim: int, rank: int) -> nn.Sequential:
    """Return LayerNorm over features, ``depth - 1`` residual MLPs, linear, token by token: (N, T, D) to (N, T, V).

    It accepts any number of tokens and any rank from 3. All dimensions but that of the features are kept, and the
    vocabulary comes last.
    """
    layers = _per_token(channels, depth, channel_dim=channel_dim, rank=rank)
    return _initialised([*layers, nn.Linear(channels, vocabulary)])


def resample_head(
    channels: int, vocabulary: int, length: int, depth: int, *, channel_dim: int, rank: int
) -> nn.Sequential:
    """Return a head for token logits of another length than the activation's: (N, ..., D) to (N, length, V).

    LayerNorm, cross-attention of the output's positions to all of the activation's
    (:class:`~sedona_fx.heads.layers.Resample`), ``depth - 1`` residual MLPs, linear. An encoder's block learns from
    what the decoder behind it will have to say (our choice; the papers have no such models).
    """
    layers = [*_per_token(channels, 1, channel_dim=channel_dim, rank=rank), Resample(channels, length)]
    layers += [ResidualMLP(channels) for _ in range(depth - 1)]
    return _initialised([*layers, nn.Linear(channels, vocabulary)])


def dense_head(
    channels: int,
    maps: int,
    depth: int,
    *,
    dims: int = 2,
    before: Sequence[nn.Module] = (),
    after: Sequence[nn.Module] = (),
) -> nn.Sequential:
    """Return a small fully convolutional head: (N, C, H, W) to (N, maps, H, W).

    1x1 convolution to C/4, ``depth - 1`` 3x3 convolutions, each with BatchNorm and ReLU, 1x1 convolution to `maps`. A
    quarter of the channels as in torchvision's ``FCNHead``, but at least 16 (or C, if that is less): the first levels
    of a U-Net have few.

    Args:
        channels: C.
        maps: number of output channels.
        depth: 1 or more.
        dims: number of spatial dimensions.
        before: layers that arrange the activation as (N, C, H, W).
        after: layers that resize the maps. They come last, since `maps` is small.
    """
    width = max(channels // 4, min(channels, 16))
    layers = [*before, *conv_bn_relu(channels, width, dims=dims)]
    for _ in range(depth - 1):
        layers += conv_bn_relu(width, width, kernel=3, dims=dims)
    return _initialised([*layers, CONVS[dims](width, maps, 1), *after])


def _spatial_input(channels: int, vector: bool) -> list[nn.Module]:
    # Decided when the head is built: a test of x.dim() in forward could not be traced.
    return [nn.Unflatten(1, (channels, 1, 1))] if vector else []


def _per_token(channels: int, depth: int, *, channel_dim: int, rank: int) -> list[nn.Module]:
    """Return the layers that treat each token by itself, with the features moved to the last dimension."""
    moved = [MoveDim(channel_dim, -1)] if channel_dim != rank - 1 else []
    return [*moved, nn.LayerNorm(channels), *(ResidualMLP(channels) for _ in range(depth - 1))]


def _initialised(layers: list[nn.Module]) -> nn.Sequential:
    """Return the head with Kaiming-normal weights (fan-in; gain 1 for the output layer) and biases of 0."""
    head = nn.Sequential(*layers)
    weighted = [m for m in head.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    for module in weighted:
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is weighted[-1] else "relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return head
