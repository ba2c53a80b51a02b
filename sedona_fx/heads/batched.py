"""Heads that read one activation run in step: layers of theirs that are alike are one operator.

Candidate heads begin alike (SEDONA's: a 1x1 convolution, a depthwise one, inverted residuals; Pyeon et al., ICLR 2021)
and each of their operators is too small to be worth its call: on a CPU a convolution with 4 outgoing channels takes
nearly as long as one with 16. So their channels lie side by side in one tensor. Convolutions of the shared input become
one with all the outgoing channels, later ones one with as many more groups; BatchNorm treats every channel by itself
anyway. Where heads part, their channels part, and what is alike no longer runs by itself.

The weights are put together at each call: parameters, buffers and names stay those of the heads. The numbers are those
of the heads run one after the other, up to rounding, derivatives included.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.heads.layers import HeadBatchNorm, InvertedResidual

Layers = Sequence[nn.Module]


def run_together(heads: Sequence[nn.Module], activation: Tensor) -> list[Tensor]:
    """Return every head's output for one activation, in training. Heads of any kind may be among them."""
    layers = [list(head) if type(head) is nn.Sequential and not _hooked(head) else [head] for head in heads]
    found = dict[int, Tensor]()
    groups = _alike(list(range(len(heads))), [_form(own[0], first=True) if own else None for own in layers])
    laid_out = _laid_out(activation) if any(len(group) > 1 for group in groups) else activation
    for group in groups:
        if len(group) == 1:
            found[group[0]] = _one(layers[group[0]], activation)
        else:
            weight = torch.cat([_weight(layers[k][0]) for k in group])
            _together(group, layers, 1, _convolved(layers[group[0]][0], laid_out, weight, 1), found)
    return [found[k] for k in range(len(heads))]


def _together(members: Sequence[int], layers: Sequence[Layers], at: int, x: Tensor, found: dict[int, Tensor]) -> None:
    """Run heads whose channels lie side by side in `x`, in the order of `members`, from their layer `at` on."""
    while True:
        forms = [_form(layers[k][at]) if at < len(layers[k]) else None for k in members]
        if forms[0] is None or any(form != forms[0] for form in forms):
            break
        x = _apply([layers[k][at] for k in members], x)
        at += 1
    groups = _alike(members, forms)
    width = x.shape[1] // len(members)
    runs = [list(run) for _, run in groupby(members, lambda k: next(g for g, own in enumerate(groups) if k in own))]
    parts = dict(zip((run[0] for run in runs), x.split([width * len(run) for run in runs], 1), strict=True))
    for group in groups:
        own = [parts[k] for k in group if k in parts]
        joined = own[0] if len(own) == 1 else torch.cat(own, 1)
        if len(group) == 1:
            found[group[0]] = _one(layers[group[0]][at:], joined)
        else:
            _together(group, layers, at, joined, found)


def _alike(members: Sequence[int], forms: Sequence[Hashable]) -> list[list[int]]:
    """Group heads by the form of a layer; one without a form (None) is alone."""
    groups: dict[Hashable, list[int]] = {}
    for k, form in zip(members, forms, strict=True):
        groups.setdefault(("alone", k) if form is None else form, []).append(k)
    return list(groups.values())


def _one(layers: Layers, x: Tensor) -> Tensor:
    for layer in layers:
        x = _apply([layer], x) if _form(layer) is not None else layer(x)
    return x


def _form(layer: nn.Module, *, first: bool = False) -> Hashable:
    """Say what a layer does, its weights apart, or None if it is none that runs together with others.

    Only types that are known to the letter count: a subclass, a parametrisation or a hook may do anything. A `first`
    layer reads the shared activation; what keeps channels apart cannot be shared there.
    """
    if _hooked(layer):
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
    if type(layer) is InvertedResidual and type(layer.branch) is nn.Sequential and not _hooked(layer.branch):
        forms = tuple(_form(inner) for inner in layer.branch)
        return None if None in forms else ("residual", layer.residual, forms)
    return None


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _apply(layers: Layers, x: Tensor) -> Tensor:
    """Run layers of one form on channels side by side."""
    layer = layers[0]
    if isinstance(layer, InvertedResidual):
        out = x
        for inner in zip(*(own.branch for own in layers if isinstance(own, InvertedResidual)), strict=True):
            out = _apply(inner, out)
        return x + out if layer.residual else out
    if isinstance(layer, HeadBatchNorm):
        return _normalised([norm for norm in layers if isinstance(norm, HeadBatchNorm)], x)
    if isinstance(layer, nn.Conv2d):
        return _convolved(layer, x, torch.cat([_weight(own) for own in layers]), len(layers) * layer.groups)
    out = layer(x)
    return out


def _convolved(layer: nn.Module, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    middle = tuple(side // 2 for side in layer.kernel_size)
    single = x.shape[2:] == (1, 1) and layer.padding == middle and layer.dilation == (1, 1)
    if single and weight.shape[1] == 1 and weight.shape[0] == x.shape[1]:
        # All but the middle of a depthwise kernel meets padding, and the general case is slow at finding that out.
        return x * weight[:, :, middle[0], middle[1]].unsqueeze(2)
    assert not isinstance(layer.padding, str)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)


def _normalised(norms: Sequence[HeadBatchNorm], x: Tensor) -> Tensor:
    """Apply BatchNorm to the channels of all; each takes its own part of the running statistics."""
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
    scale, shift = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    # One value a channel has no variance: see HeadBatchNorm.
    training = first.training and x.numel() > len(mean)
    momentum = 0.0 if first.momentum is None else first.momentum
    out = F.batch_norm(x, mean, variance, scale, shift, training, momentum, first.eps)
    if training:
        with torch.no_grad():
            torch._foreach_copy_(means, mean.split(first.num_features))
            torch._foreach_copy_(variances, variance.split(first.num_features))
            torch._foreach_add_(counts, 1)
    return out


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return layer.weight


def _laid_out(activation: Tensor) -> Tensor:
    """Put channels last on a CPU, where these small convolutions are several times faster so."""
    if activation.dim() != 4 or activation.device.type != "cpu":
        return activation
    return activation.contiguous(memory_format=torch.channels_last)
