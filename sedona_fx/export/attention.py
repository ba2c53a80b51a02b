"""Attention in plain operators, because the ONNX exporter fails on some uses of PyTorch's fused operator."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_FUSED = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def unfuse_attention(gm: fx.GraphModule) -> bool:
    """Replace every call of the fused attention in a graph by :func:`attention`, in place.

    ``torch.onnx.export`` (PyTorch 2.15) decomposes the fused operator into operators whose result has other strides
    than the fused one's, and then fails at the view that follows, in Hugging Face's T5 and Swin for instance.

    Args:
        gm: calls the fused attention as a function of ``torch.nn.functional`` or ``torch.ops.aten``.

    Returns:
        Whether there was such a call.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _FUSED]
    for node in nodes:
        node.target = attention
    gm.recompile()
    return bool(nodes)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` returns without dropout, in plain operators.

    Args:
        query: (..., L, E).
        key: (..., S, E).
        value: (..., S, E_v).
        attn_mask: broadcastable to (..., L, S): bool, True where a key may be attended to, or added to the scores.
        dropout_p: ignored: an exported graph is in eval mode.
        is_causal: whether position i attends to positions 0 to i only.
        scale: factor of the scores. None: 1 / sqrt(E).
        enable_gqa: whether `key` and `value` have fewer heads, each shared by several heads of `query`.

    Returns:
        (..., L, E_v).
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
