"""The dtypes of a head: it reads what is at its cut, and gives what the model gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sedona_fx.heads.context import HeadContext, HeadSpec
from sedona_fx.heads.registry import build_head


class CastHead(nn.Module):
    """A head that computes in another dtype than its activation has, or than the model's output has.

    Args:
        head: the head.
        weights: the dtype that it computes in.
        output: the dtype of what it gives. Both follow the net if that is converted, as buffers do.
    """

    weights: Tensor
    output: Tensor

    def __init__(self, head: nn.Module, weights: torch.dtype, output: torch.dtype) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weights", torch.empty((), dtype=weights), persistent=False)
        self.register_buffer("output", torch.empty((), dtype=output), persistent=False)

    def forward(self, activation: Tensor) -> Tensor:
        """Return the head's output for an activation."""
        result: Tensor = self.head(activation.to(self.weights.dtype))
        return result.to(self.output.dtype)


def make_head(spec: HeadSpec, context: HeadContext, like: Tensor) -> nn.Module:
    """Return a new head on the device of the model, in the dtypes of `context`.

    Args:
        spec: a registered name or a factory.
        context: what the head has to fit.
        like: a parameter of the model, for the device, and for the dtype where `context` has none.

    Raises:
        HeadError: as :func:`~sedona_fx.heads.registry.build_head`.
    """
    head, dtypes = build_head(spec, context), context.dtypes
    head = converted(head, like.device, like.dtype if dtypes is None else dtypes.weights)
    if dtypes is None or len(set(dtypes)) == 1 or context.is_complex:  # a head of complex numbers knows what it reads
        return head
    output = dtypes.weights if context.free_output else dtypes.output
    return CastHead(head, dtypes.weights, output).to(like.device)


def converted(head: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a head, its real numbers to a dtype, and its complex numbers to the complex one of that precision."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return head._apply(convert)
