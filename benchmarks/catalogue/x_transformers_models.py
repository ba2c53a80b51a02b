"""Models of x-transformers: one wrapper, and the variants of attention, position and normalisation that it offers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, imported

FAMILY, PACKAGE = "x-transformers", "x_transformers"
LENGTH = 12

DECODERS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "rotary": {"rotary_pos_emb": True},
    "ALiBi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "T5 relative positions": {"rel_pos_bias": True},
    "dynamic positions": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": False},
    "flash attention": {"attn_flash": True},
    "GLU, RMSNorm": {"ff_glu": True, "ff_swish": True, "use_rmsnorm": True, "ff_no_bias": True},
    "one head of keys": {"attn_one_kv_head": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "macaron": {"macaron": True},
    "sandwich": {"sandwich_coef": 1},
    "sandwich norm": {"sandwich_norm": True},
    "gated residuals": {"gate_residual": True},
    "shifted tokens": {"shift_tokens": 1},
    "hyper-connections": {"num_residual_streams": 2},
    "normalised queries and keys": {"attn_qk_norm": True},
}


def entries() -> Iterator[Entry]:
    """Yield all of them: decoders, an encoder, a vision transformer, and an encoder with a decoder."""
    for name, options in DECODERS.items():
        yield Entry(name, FAMILY, partial(language, "Decoder", **options), words, loss=token_loss, needs=(PACKAGE,))
    yield Entry("encoder", FAMILY, partial(language, "Encoder"), words, loss=token_loss, needs=(PACKAGE,))
    yield Entry("ViTransformerWrapper", FAMILY, vision, batches.images, needs=(PACKAGE,))
    yield Entry("ContinuousTransformerWrapper", FAMILY, series, signals, loss=F.mse_loss, needs=(PACKAGE,))


def language(kind: str, **options: Any) -> nn.Module:
    """Build a transformer over tokens from a stack of layers."""
    layers = imported(PACKAGE, kind, dim=32, depth=4, heads=4, attn_dim_head=8, **options)
    return imported(
        PACKAGE, "TransformerWrapper", num_tokens=batches.VOCABULARY, max_seq_len=LENGTH, attn_layers=layers
    )


def vision() -> nn.Module:
    """Build a vision transformer."""
    layers = imported(PACKAGE, "Encoder", dim=32, depth=4, heads=4, attn_dim_head=8)
    sizes = {"image_size": 32, "patch_size": 8}
    return imported(PACKAGE, "ViTransformerWrapper", num_classes=batches.CLASSES, attn_layers=layers, **sizes)


def series() -> nn.Module:
    """Build a transformer from vectors to vectors."""
    layers = imported(PACKAGE, "Decoder", dim=32, depth=4, heads=4, attn_dim_head=8)
    return imported(
        PACKAGE, "ContinuousTransformerWrapper", dim_in=6, dim_out=6, max_seq_len=LENGTH, attn_layers=layers
    )


def words() -> tuple[Tensor, Tensor]:
    """Return tokens, and the token that follows each."""
    named, target = batches.sentences(length=LENGTH, per_token=True)
    return named["input_ids"], target


def signals() -> tuple[Tensor, Tensor]:
    """Return vectors in a row, and as many that they are to become."""
    return torch.randn(4, LENGTH, 6, generator=batches.generator()), batches.targets_of((4, LENGTH, 6))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of one token a place."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
