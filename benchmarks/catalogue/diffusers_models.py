"""Models of diffusers, small: U-Nets and transformers that predict noise, and autoencoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, imported

FAMILY = PACKAGE = "diffusers"

Shapes = Mapping[str, tuple[int, ...]]

_WIDTHS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4}
_IMAGE = {"sample_size": 16, "patch_size": 2, "in_channels": 4}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    **_WIDTHS,
}
_FLUX = {**_SMALL, "in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 8, "guidance_embeds": False}

# name -> class, options, shapes of the inputs besides the timestep
DENOISERS: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "UNet2DModel": (
        "UNet2DModel",
        {
            **_WIDTHS,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"sample": (2, 3, 16, 16)},
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        {
            **_WIDTHS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
        },
        {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 6, 16)},
    ),
    "UNet3DConditionModel": (
        "UNet3DConditionModel",
        {
            **_WIDTHS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
        },
        {"sample": (2, 4, 2, 16, 16), "encoder_hidden_states": (2, 6, 16)},
    ),
    "UNet1DModel": (
        "UNet1DModel",
        {"block_out_channels": (32, 32, 64), "extra_in_channels": 64, "sample_size": 64},
        {"sample": (2, 2, 64)},
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel",
        {**_SMALL, **_IMAGE, "num_embeds_ada_norm": 100},
        {"hidden_states": (2, 4, 16, 16), "class_labels": (2,)},
    ),
    "PixArtTransformer2DModel": (
        "PixArtTransformer2DModel",
        {**_SMALL, **_IMAGE, "cross_attention_dim": 16, "caption_channels": 12, "use_additional_conditions": False},
        {"hidden_states": (2, 4, 16, 16), "encoder_hidden_states": (2, 6, 12)},
    ),
    "SD3Transformer2DModel": (
        "SD3Transformer2DModel",
        {
            **_SMALL,
            **_IMAGE,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
        },
        {"hidden_states": (2, 4, 16, 16), "encoder_hidden_states": (2, 6, 16), "pooled_projections": (2, 8)},
    ),
    "FluxTransformer2DModel": (
        "FluxTransformer2DModel",
        {**_FLUX, "patch_size": 1, "num_single_layers": 3, "axes_dims_rope": (2, 2, 4)},
        {
            "hidden_states": (2, 16, 4),
            "encoder_hidden_states": (2, 6, 16),
            "pooled_projections": (2, 8),
            "img_ids": (16, 3),
            "txt_ids": (6, 3),
        },
    ),
    "SanaTransformer2DModel": (
        "SanaTransformer2DModel",
        {
            **_SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 16,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
        },
        {"hidden_states": (2, 4, 16, 16), "encoder_hidden_states": (2, 6, 12)},
    ),
    "PriorTransformer": (
        "PriorTransformer",
        {**_SMALL, "embedding_dim": 16, "num_embeddings": 6, "additional_embeddings": 4},
        {"hidden_states": (2, 16), "proj_embedding": (2, 16), "encoder_hidden_states": (2, 6, 16)},
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "Transformer2DModel": (
        "Transformer2DModel",
        {**_SMALL, "in_channels": 8, "norm_num_groups": 4},
        {"hidden_states": (2, 8, 8, 8)},
    ),
    "AutoencoderKL": ("AutoencoderKL", _VAE, {"sample": (2, 3, 16, 16)}),
    "VQModel": ("VQModel", {**_VAE, "num_vq_embeddings": 16}, {"sample": (2, 3, 16, 16)}),
    "AutoencoderTiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 2, 2),
            "num_decoder_blocks": (2, 2, 1),
        },
        {"sample": (2, 3, 16, 16)},
    ),
}
OUTPUTS = {"PixArtTransformer2DModel": (2, 8, 16, 16)}
"""Shapes of outputs that are not the first input's."""
CLASSES_OF_IMAGES = 100


def entries() -> Iterator[Entry]:
    """Yield all of them, those that get a timestep first."""
    for table, steps in ((DENOISERS, True), (OTHERS, False)):
        for name, (kind, options, shapes) in table.items():
            pair: Callable[[], Any] = partial(noise, shapes, OUTPUTS.get(name), steps)
            yield Entry(name, FAMILY, partial(imported, PACKAGE, kind, **options), pair, loss=loss, needs=(PACKAGE,))


def noise(shapes: Shapes, output: tuple[int, ...] | None, steps: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs of some shapes, a timestep for each example if wanted, and what the output is to become."""
    source = batches.generator()
    inputs = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    if "class_labels" in inputs:
        inputs["class_labels"] = torch.randint(CLASSES_OF_IMAGES, shapes["class_labels"], generator=source)
    if steps:
        inputs["timestep"] = torch.randint(1, 100, (2,), generator=source)
    return inputs, batches.targets_of(output or next(iter(shapes.values())))


def loss(output: Any, target: Tensor) -> Tensor:
    """Return the squared distance of the only tensor of the output from the target."""
    found = [output[key] for key in output if isinstance(output[key], Tensor)]
    return F.mse_loss(found[0], target)
