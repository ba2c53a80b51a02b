"""Models of segmentation_models_pytorch: every decoder, each on a small encoder; ten classes a pixel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from catalogue import batches
from catalogue.entry import Entry, imported

FAMILY = PACKAGE = "segmentation_models_pytorch"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Unet, resnet18": ("Unet", {"encoder_name": "resnet18"}),
    "Unet, mobilenet_v2": ("Unet", {"encoder_name": "mobilenet_v2"}),
    "Unet, efficientnet-b0": ("Unet", {"encoder_name": "efficientnet-b0"}),
    "Unet, mit_b0": ("Unet", {"encoder_name": "mit_b0"}),
    "Unet, scse attention": ("Unet", {"encoder_name": "resnet18", "decoder_attention_type": "scse"}),
    "UnetPlusPlus": ("UnetPlusPlus", {"encoder_name": "resnet18"}),
    "FPN": ("FPN", {"encoder_name": "resnet18"}),
    "DeepLabV3": ("DeepLabV3", {"encoder_name": "resnet18"}),
    "DeepLabV3Plus": ("DeepLabV3Plus", {"encoder_name": "resnet18"}),
    "DeepLabV3Plus, mobilenet_v2": ("DeepLabV3Plus", {"encoder_name": "mobilenet_v2"}),
    "PSPNet": ("PSPNet", {"encoder_name": "resnet18"}),
    "Linknet": ("Linknet", {"encoder_name": "resnet18"}),
    "MAnet": ("MAnet", {"encoder_name": "resnet18"}),
    "PAN": ("PAN", {"encoder_name": "resnet18"}),
    "UPerNet": ("UPerNet", {"encoder_name": "resnet18"}),
    "Segformer": ("Segformer", {"encoder_name": "mit_b0"}),
    "DPT": ("DPT", {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}),
}
LARGE = {"PAN": 128}
"""Pixels, where 64 are too few."""


def entries() -> Iterator[Entry]:
    """Yield all of them."""
    for name, (kind, options) in MODELS.items():
        size = LARGE.get(name, 64)
        build = partial(imported, PACKAGE, kind, encoder_weights=None, classes=batches.CLASSES, **options)
        yield Entry(name, FAMILY, build, partial(batches.scenes, size), needs=(PACKAGE,))
