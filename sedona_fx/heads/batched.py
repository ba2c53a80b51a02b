"""Run several heads on one activation with fewer operators: equal layers of different heads run as one.

Candidate heads start with equal layers (SEDONA's: a 1x1 convolution, a depthwise one, inverted residuals; Pyeon et al.,
ICLR 2021), and each of these operators is too small to be worth its call: on a CPU a convolution with 4 output channels
takes nearly as long as one with 16. The channels of such heads are therefore kept side by side in one tensor.
Convolutions of the shared input become one convolution with all output channels, and later convolutions become one with
as many times more groups; BatchNorm treats every channel by itself anyway. Where the heads differ, the tensor is split,
and layers without an equal run by themselves.

The weights are concatenated in every call, so parameters, buffers and their names stay those of the heads. The results
are those of running the heads one after the other, up to rounding, derivatives included.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.heads.layers import HeadBatchNorm, InvertedResidual
from sedona_fx.heads.rows import ArrangedHead

Layers = Sequence[nn.Module]


def run_together(heads: Sequence[nn.Module], activation: Tensor) -> list[Tensor]:
    """Return the output of every head for one activation, in training mode.

    Args:
        heads: modules of any kind. Only `nn.Sequential` heads without hooks share operators; others run as they are.
        activation: what all heads read.

    Returns:
        The outputs, in the order of `heads`.
    """
    arranged = [head for head in heads if isinstance(head, ArrangedHead) and not _has_hooks(head)]
    if arranged and len(arranged) == len(heads) and len({head.arrangement for head in arranged}) == 1:
        outputs_inside = run_together([head.head for head in arranged], arranged[0].arrangement.enter(activation))
        return [head.leave(output) for head, output in zip(arranged, outputs_inside, strict=True)]
    layers = [list(head) if type(head) is nn.Sequential and not _has_hooks(head) else [head] for head in heads]
    outputs: dict[int, Tensor] = {}
    keys = [_batch_key(own_layers[0], first=True) if own_layers else None for own_layers in layers]
    groups = _group(list(range(len(heads))), keys)
    shared = _channels_last(activation) if any(len(group) > 1 for group in groups) else activation
    for group in groups:
        if len(group) == 1:
            outputs[group[0]] = _run_layers(layers[group[0]], activation)
        else:
            weight = torch.cat([_weight(layers[k][0]) for k in group])
            _run_group(group, layers, 1, _convolve(layers[group[0]][0], shared, weight, 1), outputs)
    return [outputs[k] for k in range(len(heads))]


def _run_group(
    members: Sequence[int], layers: Sequence[Layers], position: int, x: Tensor, outputs: dict[int, Tensor]
) -> None:
    """Run heads from their layer `position` on, and store their results in `outputs`.

    Args:
        members: indices of the heads, in the order in which their channels lie side by side in `x`.
        layers: the layers of every head.
        position: index of the next layer, the same for all members.
        x: the input of that layer.
        outputs: head index -> output.
    """
    while True:
        keys = [_batch_key(layers[k][position]) if position < len(layers[k]) else None for k in members]
        if keys[0] is None or any(key != keys[0] for key in keys):
            break
        x = _apply([layers[k][position] for k in members], x)
        position += 1
    groups = _group(members, keys)
    group_of = {k: number for number, group in enumerate(groups) for k in group}
    # Neighbours in x that stay in one group stay in one piece.
    runs = [list(run) for _, run in groupby(members, group_of.__getitem__)]
    width = x.shape[1] // len(members)
    pieces = dict(zip((run[0] for run in runs), x.split([width * len(run) for run in runs], 1), strict=True))
    for group in groups:
        group_pieces = [pieces[k] for k in group if k in pieces]
        joined = group_pieces[0] if len(group_pieces) == 1 else torch.cat(group_pieces, 1)
        if len(group) == 1:
            outputs[group[0]] = _run_layers(layers[group[0]][position:], joined)
        else:
            _run_group(group, layers, position, joined, outputs)


def _group(members: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
    """Group heads by the key of their next layer; a head whose key is None forms a group of its own."""
    groups: dict[Hashable, list[int]] = {}
    for k, key in zip(members, keys, strict=True):
        groups.setdefault(("alone", k) if key is None else key, []).append(k)
    return list(groups.values())


def _run_layers(layers: Layers, x: Tensor) -> Tensor:
    for layer in layers:
        x = _apply([layer], x) if _batch_key(layer) is not None else layer(x)
    return x


def _batch_key(layer: nn.Module, *, first: bool = False) -> Hashable:
    """Return a key that layers share if they can run as one operator, or None if `layer` has to run by itself.

    The key describes everything about the layer but its weights. Only exact types count, since a subclass, a
    parametrisation or a hook may do anything. A `first` layer reads the activation that all heads share, so an
    operator that keeps channels apart (a grouped convolution) cannot be shared there.
    """
    if _has_hooks(layer):
        return None
    if type(layer) is nn.Conv2d and layer.bias is None and layer.padding_mode == "zeros" and layer.padding != "same":
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        return ("conv", layer.weight.shape, *geometry) if layer.groups == 1 or not first else None
    if first:
        return None
    if type(layer) is nn.ReLU:
        return ("relu", layer.inplace)
    if type(layer) is HeadBatchNorm and layer.affine and layer.track_running_stats and layer.momentum is not None:
        return ("norm", layer.num_features, layer.eps, layer.momentum, layer.training)
    if type(layer) is InvertedResidual and type(layer.branch) is nn.Sequential and not _has_hooks(layer.branch):
        keys = tuple(_batch_key(inner) for inner in layer.branch)
        return None if None in keys else ("residual", layer.residual, keys)
    return None


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _apply(layers: Layers, x: Tensor) -> Tensor:
    """Apply layers with equal keys, each to its own channels of `x`."""
    layer = layers[0]
    if isinstance(layer, InvertedResidual):
        out = x
        branches = (residual.branch for residual in layers if isinstance(residual, InvertedResidual))
        for inner_layers in zip(*branches, strict=True):
            out = _apply(inner_layers, out)
        return x + out if layer.residual else out
    if isinstance(layer, HeadBatchNorm):
        return _batch_norm([norm for norm in layers if isinstance(norm, HeadBatchNorm)], x)
    if isinstance(layer, nn.Conv2d):
        return _convolve(layer, x, torch.cat([_weight(conv) for conv in layers]), len(layers) * layer.groups)
    out = layer(x)
    return out


def _convolve(layer: nn.Module, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Convolve with `weight` and `groups`, and with the geometry of `layer`."""
    assert isinstance(layer, nn.Conv2d)
    middle = tuple(side // 2 for side in layer.kernel_size)
    single = x.shape[2:] == (1, 1) and layer.padding == middle and layer.dilation == (1, 1)
    if single and weight.shape[1] == 1 and weight.shape[0] == x.shape[1]:
        # On a 1x1 map all of a depthwise kernel but its middle meets padding. The general kernel is slow in that case.
        return x * weight[:, :, middle[0], middle[1]].unsqueeze(2)
    assert not isinstance(layer.padding, str)
    return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=groups)


def _batch_norm(norms: Sequence[HeadBatchNorm], x: Tensor) -> Tensor:
    """Apply each BatchNorm to its own channels of `x`, and update its own running statistics."""
    first = norms[0]
    means, variances, counts = [], [], []
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        means.append(norm.running_mean)
        variances.append(norm.running_var)
        counts.append(norm.num_batches_tracked)
    mean, variance = torch.cat(means), torch.cat(variances)
    # A single value per channel has no variance: see HeadBatchNorm.
    training = first.training and x.numel() > len(mean)
    out = F.batch_norm(
        x,
        mean,
        variance,
        weight=torch.cat([norm.weight for norm in norms]),
        bias=torch.cat([norm.bias for norm in norms]),
        training=training,
        momentum=0.0 if first.momentum is None else first.momentum,
        eps=first.eps,
    )
    if training:
        with torch.no_grad():
            torch._foreach_copy_(means, mean.split(first.num_features))
            torch._foreach_copy_(variances, variance.split(first.num_features))
            torch._foreach_add_(counts, 1)
    return out


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return layer.weight


def _channels_last(activation: Tensor) -> Tensor:
    """Return an image in channels-last layout on a CPU, where these small convolutions are several times faster so."""
    if activation.dim() != 4 or activation.device.type != "cpu":
        return activation
    return activation.contiguous(memory_format=torch.channels_last)
