"""Attention in plain operators, for an exporter that cannot take PyTorch's fused one apart."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_FUSED = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def unfuse_attention(gm: fx.GraphModule) -> bool:
    """Replace every fused attention of a graph, in place; return whether there was one.

    ``torch.onnx.export`` (PyTorch 2.15) takes the fused operator apart into operators with other strides than promised
    and then fails at the view that follows, in Hugging Face's T5 and Swin for instance.
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
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` returns in evaluation, (..., L, E_v)."""
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
