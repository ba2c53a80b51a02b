"""FLOPs of operators: PyTorch's formulas, and those that it lacks.

Two a multiply-add, as PyTorch counts; biases, norms, activations and look-ups count nothing. The formula of an operator
of your own is ``torch.utils.flop_counter.register_flop_formula``, which comes before those here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]
"""Takes the arguments of an operator, and its result as ``out_val``."""


def formula_of(operator: Any) -> Formula | None:
    """Return the formula of an operator, or None if there is none."""
    packet = getattr(operator, "_overloadpacket", operator)
    formula: Formula | None = flop_registry.get(packet)
    return formula if formula is not None else _OWN.get(name_of(operator))


def name_of(operator: Any) -> str:
    """Return the name of an operator without its overload: ``aten::addmm``."""
    return str(operator.name()).partition(".")[0]


def is_free(operator: Any) -> bool:
    """Whether an operator of PyTorch's does no more than a few operations a number: it is rightly counted as nothing."""
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace not in ("aten", "prim", "prims"):
        return False
    return operator.is_view or torch.Tag.pointwise in operator.tags or name_of(operator) in _FREE


_FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_fused_rms_norm"),
        *("cudnn_batch_norm", "batch_norm", "_batch_norm_with_update", "_weight_norm_interface", "renorm"),
        *("embedding", "embedding_renorm_", "cat", "stack", "index", "index_put", "index_put_", "index_add", "gather"),
        *("scatter", "scatter_add", "copy_", "copy", "_to_copy", "clone", "where", "masked_scatter", "index_select"),
        *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "slice_scatter", "select_scatter", "as_strided_scatter"),
        *("slice", "select", "as_strided", "_prelu_kernel", "fill_", "lift_fresh_copy", "searchsorted", "bucketize"),
    )
)
"""Operators, neither views nor element by element, that read weights and activations and count nothing."""


def _of_recurrence(x: Tensor, *weights: Any, out_val: Any = None, **_: Any) -> int:
    """Each step multiplies by every weight of its layer and direction once; a packed sequence has no padded steps."""
    return 2 * math.prod(x.shape[:-1]) * _elements(weights)


def _of_onednn_layer(x: Tensor, w0: Tensor, w1: Tensor, *_: Any, **__: Any) -> int:
    return _of_recurrence(x, w0, w1)


def _of_cudnn_recurrence(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return _of_recurrence(x, *weights)


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Queries times keys, and scores times values; masks spare nothing."""
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * rows * (query.shape[-1] + value.shape[-1])


def _of_multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, *weights: Any, **_: Any
) -> int:
    """Projections into queries, keys and values, attention, and the projection out: (N, T, E)."""
    if query.is_nested:
        return 0  # of evaluation without gradients, which no cost is asked of
    in_proj, _in_bias, out_proj = weights[:3]
    rows, others = math.prod(query.shape[:-1]), math.prod(key.shape[:-1])
    projections = 2 * (rows * (in_proj.numel() // 3 + out_proj.numel()) + 2 * others * (in_proj.numel() // 3))
    return projections + 4 * rows * key.shape[1] * embed_dim


def _of_encoder_layer(src: Tensor, embed_dim: int, num_heads: int, *weights: Any, **_: Any) -> int:
    if src.is_nested:
        return 0
    attention = _of_multi_head_attention(src, src, src, embed_dim, num_heads, *weights)
    in_proj, out_proj = weights[0], weights[2]
    feed_forward = _elements(weights) - in_proj.numel() - out_proj.numel()
    return attention + 2 * math.prod(src.shape[:-1]) * feed_forward


def _of_bilinear(first: Tensor, weight: Tensor, second: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """(N, I), (O, I, J), (N, J) to (N, O): I J multiply-adds, then J, for each number."""
    outputs, inputs, others = weight.shape[-3:]
    rows = out_val.numel() // outputs if outputs else 0
    return 2 * rows * outputs * others * (inputs + 1)


def _of_embedding_bag(weight: Tensor, indices: Tensor, *rest: Any, per_sample_weights: Any = None, **_: Any) -> int:
    """One addition a number that is looked up; a multiplication as well where rows have weights."""
    weighted = per_sample_weights is not None or (len(rest) > 4 and rest[4] is not None)
    return (2 if weighted else 1) * indices.numel() * weight.shape[-1]


def _of_matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _of_added_matrix_vector(_start: Tensor, matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _of_added_product(_start: Tensor, first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    return _of_product(first, second)


def _of_product(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    return 2 * first.numel() * second.shape[-1]


def _of_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.numel()


def _of_distances(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    return 2 * first.numel() * second.shape[-2]


def _of_deformed_convolution(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * (out_val.numel() // weight.shape[0]) * weight.numel()


def _of_complex_transform(x: Tensor, dims: Sequence[int], *_: Any, **__: Any) -> int:
    """5 n log2 n for n numbers, the count that FFTs are usually compared by."""
    n = math.prod(x.shape[dim] for dim in dims)
    return round(5 * x.numel() * math.log2(n)) if n else 0


def _of_real_transform(x: Tensor, dims: Sequence[int], *_: Any, out_val: Tensor, **__: Any) -> int:
    """Half of what complex numbers take."""
    real = out_val if x.is_complex() else x
    n = math.prod(real.shape[dim] for dim in dims)
    return round(2.5 * real.numel() * math.log2(n)) if n else 0


def _elements(weights: Sequence[Any]) -> int:
    """Return the number of elements of those of the arguments that are matrices."""
    return sum(w.numel() for w in weights if isinstance(w, Tensor) and w.dim() >= 2)


_OWN: dict[str, Formula] = {
    "aten::mkldnn_rnn_layer": _of_onednn_layer,
    "aten::_cudnn_rnn": _of_cudnn_recurrence,
    "aten::miopen_rnn": _of_cudnn_recurrence,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _of_attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _of_attention,
    "aten::_scaled_dot_product_attention_math_for_mps": _of_attention,
    "flex_attention": _of_attention,
    "aten::_native_multi_head_attention": _of_multi_head_attention,
    "aten::_transformer_encoder_layer_fwd": _of_encoder_layer,
    "aten::_trilinear": _of_bilinear,
    "aten::_embedding_bag": _of_embedding_bag,
    "aten::_embedding_bag_forward_only": _of_embedding_bag,
    "aten::mv": _of_matrix_vector,
    "aten::addmv": _of_added_matrix_vector,
    "aten::dot": _of_matrix_vector,
    "aten::vdot": _of_matrix_vector,
    "aten::addbmm": _of_added_product,
    "aten::_addmm_activation": _of_added_product,
    "aten::_int_mm": _of_product,
    "aten::linear": _of_linear,
    "aten::_cdist_forward": _of_distances,
    "aten::_fft_c2c": _of_complex_transform,
    "aten::_fft_r2c": _of_real_transform,
    "aten::_fft_c2r": _of_real_transform,
    "torchvision::deform_conv2d": _of_deformed_convolution,
}
