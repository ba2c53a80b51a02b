"""Networks of MONAI, for images of two and three dimensions: segmentation, classification, reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, Loss, imported

FAMILY, PACKAGE = "monai", "monai"
NETS = "monai.networks.nets"

_SEGMENT = {"spatial_dims": 3, "in_channels": 1, "out_channels": batches.CLASSES}
_CLASSIFY = {"spatial_dims": 2, "in_channels": 1, "num_classes": batches.CLASSES}
_STEPS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]}
_LEVELS = {"channels": (4, 8, 16, 32), "strides": (2, 2, 2)}
_TRANSFORMER = {"img_size": 32, "hidden_size": 32, "mlp_dim": 64, "num_heads": 4}
_LATENT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
_DIFFUSION = {"channels": (8, 16, 16), "num_res_blocks": 1, "attention_levels": (False, True, True)}

SEGMENTATION: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet": ("UNet", {**_SEGMENT, **_LEVELS}),
    "UNet, residual units": ("UNet", {**_SEGMENT, **_LEVELS, "num_res_units": 2}),
    "BasicUNet": ("BasicUNet", {**_SEGMENT, "features": (4, 4, 8, 16, 32, 4)}),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**_SEGMENT, "features": (4, 4, 8, 16, 32, 4)}),
    "AttentionUnet": ("AttentionUnet", {**_SEGMENT, **_LEVELS}),
    "SegResNet": ("SegResNet", {**_SEGMENT, "blocks_down": (1, 1, 2), "blocks_up": (1, 1)}),
    "SegResNetDS": ("SegResNetDS", {**_SEGMENT, "init_filters": 8, "blocks_down": (1, 1, 2)}),
    "DynUNet": ("DynUNet", {**_SEGMENT, **_STEPS}),
    "DynUNet, residual": ("DynUNet", {**_SEGMENT, **_STEPS, "res_block": True}),
    "DynUNet, deep supervision": ("DynUNet", {**_SEGMENT, **_STEPS, "deep_supervision": True}),
    "UNETR": ("UNETR", {**_SEGMENT, **_TRANSFORMER, "feature_size": 4}),
    "SwinUNETR": ("SwinUNETR", {**_SEGMENT, "feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 4}),
    "SwinUNETR, 2D": ("SwinUNETR", {**_SEGMENT, "spatial_dims": 2, "feature_size": 12, "window_size": 4}),
    "VNet": ("VNet", {"in_channels": 1, "out_channels": batches.CLASSES}),
    "HighResNet": ("HighResNet", _SEGMENT),
    "FlexibleUNet": ("FlexibleUNet", {**_SEGMENT, "spatial_dims": 2, "backbone": "resnet10"}),
}
CLASSIFICATION: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {**_CLASSIFY, **_TRANSFORMER, "patch_size": 8, "num_layers": 4, "classification": True}),
    "DenseNet": ("DenseNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 10, "block_config": (2, 2, 2)}),
    "SEResNet50": ("SEResNet50", _CLASSIFY),
    "EfficientNetBN": ("EfficientNetBN", {**_CLASSIFY, "model_name": "efficientnet-b0", "pretrained": False}),
    "resnet10, 3D": ("resnet10", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": batches.CLASSES}),
}


def entries() -> Iterator[Entry]:
    """Yield all of them, task by task."""
    for name, (kind, options) in SEGMENTATION.items():
        sizes = (64 if kind == "SwinUNETR" else 32,) * options.get("spatial_dims", 3)
        yield _entry(name, kind, options, partial(batches.volumes, *sizes), voxel_loss)
    for name, (kind, options) in CLASSIFICATION.items():
        loss = first_loss if kind == "ViT" else None
        yield _entry(name, kind, options, partial(scans, options["spatial_dims"]), loss)
    steps = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    small = {**_LATENT, **steps, "channels": (8, 8), "num_res_layers": 1, "num_res_channels": (8, 8)}
    yield _entry("VQVAE", "VQVAE", {**small, "num_embeddings": 16, "embedding_dim": 8}, copies, copy_loss)
    latent = {**_LATENT, **_DIFFUSION, "latent_channels": 4, "norm_num_groups": 4}
    yield _entry("AutoencoderKL", "AutoencoderKL", latent, copies, copy_loss)
    noise = {**_LATENT, **_DIFFUSION, "num_head_channels": 8, "norm_num_groups": 4}
    yield _entry("DiffusionModelUNet", "DiffusionModelUNet", noise, noisy, F.mse_loss)


def _entry(
    name: str, kind: str, options: dict[str, Any], pair: Callable[[], tuple[Any, Any]], loss: Loss | None
) -> Entry:
    return Entry(name, FAMILY, partial(imported, NETS, kind, **options), pair, loss=loss, needs=(PACKAGE,))


def scans(dims: int) -> tuple[Tensor, Tensor]:
    """Return images with one channel, and their classes."""
    x, _ = batches.volumes(*(32,) * dims)
    return x, torch.arange(len(x))


def copies() -> tuple[Tensor, Tensor]:
    """Return images, each its own target."""
    x, _ = batches.volumes(32, 32)
    return x, x.clone()


def noisy() -> tuple[dict[str, Tensor], Tensor]:
    """Return noisy images with the steps that they have been through, and the noise."""
    x, _ = batches.volumes(32, 32)
    return {"x": x, "timesteps": torch.tensor([3, 40])}, batches.targets_of((2, 1, 32, 32))


def voxel_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy over voxels of the finest output; deep supervision is stacked behind it."""
    finest = output[0] if isinstance(output, (list, tuple)) else output
    return F.cross_entropy(finest[:, 0] if finest.dim() > target.dim() + 1 else finest, target)


def first_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of the first output; the others are hidden states."""
    return F.cross_entropy(output[0], target)


def copy_loss(output: Any, target: Tensor) -> Tensor:
    """Return the squared distance of the reconstruction, the first output, from the image."""
    return F.mse_loss(output[0], target)
