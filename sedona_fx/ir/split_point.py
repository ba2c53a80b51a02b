"""The split point: what stands at a cut while it is not yet decided whether the cut is made, and with which head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.heads.batched import run_together


class _ScaledGradient(torch.autograd.Function):
    """The identity whose gradient is scaled.

    First derivatives only: differentiating twice would walk back through the scaled edges of the *forward* graph and be
    wrong by percents after a few unrolled steps. The search takes vector-Jacobian products layer by layer instead.
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
    """A mixture of candidate heads: ``sum_m softmax(beta)_m head_m(h)``, of logits (SEDONA, section 3.2)."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(len(heads)))
        self.heads = nn.ModuleList(heads)

    def forward(self, activation: Tensor) -> Tensor:
        """Return the mixed logits for an activation ``h_i``."""
        heads = list(self.heads)
        # In evaluation one after the other: nothing is to be gained there, and so it can be traced.
        outputs = run_together(heads, activation) if self.training else [head(activation) for head in heads]
        weights = torch.softmax(self.beta, 0)
        mixed = weights[0] * outputs[0]
        for weight, output in zip(weights[1:], outputs[1:], strict=True):
            mixed = mixed + weight * output
        return mixed


class SplitPoint(nn.Module):
    """A relaxed cut: ``(h, local output)``, gradients weighted by ``softmax(alpha) = (p_isolate, p_through)``.

    With the sum of all local losses and the final loss, one ordinary backward gives every base layer the gradient of
    ``Lt_i = p_isolate l_i + p_through Lt_(i+1)`` and every head the gradient of its own loss at full rate. The relaxed
    cut lies between an ordinary edge (through = 1) and a detach (through = 0).
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
        """Return the way forward, the local output (None without heads), and the way forward of the other values.

        All values that cross here are let through at the same rate; the heads read the activation alone.
        """
        isolate, through = torch.softmax(self.alpha.detach(), 0)
        local = None
        if self.mixture is not None:
            local = self.mixture(_ScaledGradient.apply(activation, isolate))
        return _ScaledGradient.apply(activation, through), local, *(_ScaledGradient.apply(t, through) for t in others)


def gated_value(split: fx.Node, item: fx.Node) -> fx.Node:
    """Return the value in front of a split point that `item`, one of the split point's results, stands for behind it.

    ``split_point(h, a, b)`` returns ``(h, local output, a, b)``.
    """
    place = item.args[1]
    assert isinstance(place, int)
    value = split.args[max(0, place - 1)]
    assert isinstance(value, fx.Node)
    return value
