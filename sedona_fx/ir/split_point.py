"""The split point: the module at a cut point while it is undecided whether to cut there, and with which head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.heads.batched import run_together


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a scale.

    It has first derivatives only. A second derivative would propagate through the scaled edges of the *forward* graph
    again, and be wrong by percents after a few unrolled steps. The search computes vector-Jacobian products layer by
    layer instead.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


class MixedHead(nn.Module):
    """A mixture of candidate heads: ``sum_m softmax(beta)_m head_m(h)``, of logits.

    From SEDONA (Pyeon et al., ICLR 2021), section 3.2.

    Args:
        heads: the M candidates. `beta` (M,) starts at 0.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(len(heads)))
        self.heads = nn.ModuleList(heads)

    def forward(self, activation: Tensor) -> Tensor:
        """Return the mixed logits for an activation ``h_i``."""
        heads = list(self.heads)
        # One after the other in evaluation, where sharing operators gains nothing: this path can be traced.
        outputs = run_together(heads, activation) if self.training else [head(activation) for head in heads]
        weights = torch.softmax(self.beta, 0)
        mixed = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            mixed = mixed + weight * output
        return mixed


class SplitPoint(nn.Module):
    """A relaxed cut: ``(h, local output)``, gradients weighted by ``softmax(alpha) = (p_isolate, p_through)``.

    With the sum of all local losses and the final loss, one ordinary backward pass gives every base layer the gradient
    of ``Lt_i = p_isolate l_i + p_through Lt_(i+1)``, and every head the unscaled gradient of its own loss. The relaxed
    cut lies between an ordinary edge (p_through = 1) and a detach (p_through = 0).

    Args:
        heads: the candidate heads; none for a split point without a local output. `alpha` (2,) starts at 0.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(2))
        self.mixture = MixedHead(heads) if heads else None

    @property
    def heads(self) -> list[nn.Module]:
        """The candidate heads, in the order of beta."""
        return list(self.mixture.heads) if self.mixture is not None else []

    def forward(self, activation: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        """Return the activation, the local output (None without heads), and the other values.

        Args:
            activation: the value of the cut point, which the heads read.
            others: the other live values that cross here. Their gradients are scaled by the same `p_through`.
        """
        isolate, through = torch.softmax(self.alpha.detach(), 0)
        local = None
        if self.mixture is not None:
            local = self.mixture(_ScaledGradient.apply(activation, isolate))
        return _ScaledGradient.apply(activation, through), local, *(_ScaledGradient.apply(t, through) for t in others)


def gated_value(split: fx.Node, item: fx.Node) -> fx.Node:
    """Return the argument of a split point that one of its results passes on.

    ``split_point(h, a, b)`` returns ``(h, local output, a, b)``.

    Args:
        split: the call of the split point.
        item: the node that takes the result out of the returned tuple. It must not be the local output.
    """
    index = item.args[1]
    assert isinstance(index, int)
    value = split.args[max(0, index - 1)]
    assert isinstance(value, fx.Node)
    return value
