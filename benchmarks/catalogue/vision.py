"""Every model of torchvision that is not quantised, by its own constructor, for ten classes and small images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry

SIZES = {"alexnet": 64, "squeezenet": 64, "inception_v3": 107, "maxvit": 224, "vit_h_14": 42, "googlenet": 64}
"""Image sizes by the beginning of a name, where 32 pixels are too few."""
CLIPS = {"mvit": (16, 224, 1), "s3d": (16, 224, 2), "swin3d": (4, 32, 2)}
"""Frames, pixels and batch by the beginning of a name, where 8, 32 and 2 do not fit."""
NO_WEIGHTS = {"weights": None, "weights_backbone": None}


def entries() -> Iterator[Entry]:
    """Yield all of them, family by family."""
    quantised = set(zoo.list_models(module=zoo.quantization))
    tables = (
        (zoo.detection, _detection),
        (zoo.segmentation, _segmentation),
        (zoo.video, _video),
        (zoo.optical_flow, _flow),
        (zoo, _classification),
    )
    for module, make in reversed(tables):
        yield from map(make, sorted(set(zoo.list_models(module=module)) - quantised))


def _classification(name: str) -> Entry:
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 32)
    options: dict[str, Any] = {"num_classes": batches.CLASSES}
    note = ""
    if name.startswith("vit"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    build = partial(zoo.get_model, name, weights=None, **options)
    if name == "alexnet" or name.startswith("vgg"):
        build, note = partial(narrow, name), "classifier of 64 channels"
    if name == "inception_v3":
        build, note = small_inception, "auxiliary classifier with a 1x1 kernel, as the image is small"
    batch = 2 if size > 64 else 4
    return Entry(name, "torchvision classification", build, partial(batches.images, size, batch), note=note)


def narrow(name: str) -> nn.Module:
    """Build a model whose classifier is made of vast linear layers, with narrow ones: it saves time and memory."""
    model = zoo.get_model(name, weights=None, num_classes=batches.CLASSES)
    width = None
    for at, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            model.classifier[at] = nn.Linear(width or layer.in_features, min(layer.out_features, 64))
            width = 64
    return model


def small_inception() -> nn.Module:
    """Build an Inception v3 that takes images of 107 pixels; its auxiliary classifier's 5x5 kernel would need 299."""
    model = zoo.inception_v3(num_classes=batches.CLASSES, init_weights=False)
    model.AuxLogits.conv1 = zoo.inception.BasicConv2d(128, 768, kernel_size=1)
    return model


def _segmentation(name: str) -> Entry:
    return Entry(
        name,
        "torchvision segmentation",
        partial(zoo.get_model, name, num_classes=batches.CLASSES, **NO_WEIGHTS),
        batches.scenes,
        loss=pixel_loss,
    )


def pixel_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy over pixels of a segmentation model's dictionary."""
    return F.cross_entropy(output["out"], target)


def _video(name: str) -> Entry:
    frames, size, batch = next((clip for start, clip in CLIPS.items() if name.startswith(start)), (8, 32, 2))
    build = partial(zoo.get_model, name, weights=None, num_classes=batches.CLASSES)
    return Entry(name, "torchvision video", build, partial(batches.clips, frames, size, batch))


def _flow(name: str) -> Entry:
    return Entry(
        name,
        "torchvision optical flow",
        partial(zoo.get_model, name, weights=None),
        batches.image_pairs,
        loss=flow_loss,
        options={"output": 1},
        note="two refinements",
    )


def flow_loss(output: Any, target: Tensor) -> Tensor:
    """Return the distance of the last refinement from the true flow."""
    return (output[-1] - target).abs().mean()


def _detection(name: str) -> Entry:
    options: dict[str, Any] = {"num_classes": batches.CLASSES}
    size = 64
    if name.startswith("ssd"):
        size = 300 if name == "ssd300_vgg16" else 320  # their own, whatever the images have
    else:
        options |= {"min_size": size, "max_size": size}
    keypoints = 0
    if name.startswith("keypoint"):
        options["num_keypoints"] = keypoints = 5
    return Entry(
        name,
        "torchvision detection",
        partial(zoo.get_model, name, **NO_WEIGHTS, **options),
        partial(batches.annotated, size, masks=name.startswith("mask"), keypoints=keypoints),
        loss=sum_of_losses,
        options={"root": "backbone", "heads": False},
        note="the backbone is cut, without heads",
    )


def sum_of_losses(output: Any, target: Any) -> Tensor:
    """Return the sum of the losses that a detector in training returns; they know their targets."""
    return torch.stack(list(output.values())).sum()
