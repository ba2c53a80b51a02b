"""Batches of noise: images, clips, tokens, spectra and waveforms, each with a target. The same numbers every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CLASSES = 10
VOCABULARY = 96


def generator() -> torch.Generator:
    """Return the source of all noise."""
    return torch.Generator().manual_seed(1)


def images(size: int = 32, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Return images and their classes."""
    source = generator()
    return torch.randn(batch, 3, size, size, generator=source), torch.randint(CLASSES, (batch,), generator=source)


def scenes(size: int = 64, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return images and a class for every pixel."""
    source = generator()
    x = torch.randn(batch, 3, size, size, generator=source)
    return x, torch.randint(CLASSES, (batch, size, size), generator=source)


def clips(frames: int, size: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return videos and their classes."""
    source = generator()
    x = torch.randn(batch, 3, frames, size, size, generator=source)
    return x, torch.randint(CLASSES, (batch,), generator=source)


def image_pairs(size: int = 128, batch: int = 2, updates: int = 2) -> tuple[Mapping[str, Any], Tensor]:
    """Return two images, the number of refinements, and the optical flow between them."""
    source = generator()
    first, second = (torch.rand(batch, 3, size, size, generator=source) * 2 - 1 for _ in range(2))
    flow = torch.randn(batch, 2, size, size, generator=source)
    return {"image1": first, "image2": second, "num_flow_updates": updates}, flow


def annotated(size: int = 64, batch: int = 2, *, masks: bool = False, keypoints: int = 0) -> tuple[Any, Tensor]:
    """Return a list of images and the boxes in them, as detectors take both; the losses are the model's own."""
    source = generator()
    x = [torch.rand(3, size, size, generator=source) for _ in range(batch)]
    found = []
    for _ in range(batch):
        boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.9]]) * size
        target = {"boxes": boxes, "labels": torch.randint(1, CLASSES, (2,), generator=source)}
        if masks:
            target["masks"] = (torch.rand(2, size, size, generator=source) > 0.5).to(torch.uint8)
        if keypoints:
            spots = 0.2 * size + 0.3 * size * torch.rand(2, keypoints, 2, generator=source)
            target["keypoints"] = torch.cat([spots, torch.ones(2, keypoints, 1)], dim=2)
        found.append(target)
    return (x, found), torch.zeros(batch)


def sentences(batch: int = 4, length: int = 12, *, per_token: bool = False) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return tokens with a mask that hides the ends of some, and a class for each sentence, or for each token."""
    source = generator()
    tokens = torch.randint(4, VOCABULARY, (batch, length), generator=source)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[::2, -3:] = 0
    if per_token:
        return {"input_ids": tokens, "attention_mask": mask}, torch.randint(
            VOCABULARY, (batch, length), generator=source
        )
    return {"input_ids": tokens, "attention_mask": mask}, torch.randint(CLASSES, (batch,), generator=source)


def translations(batch: int = 4, length: int = 10) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return source and target tokens, and the token that follows each target token."""
    source = generator()
    first, second, target = (torch.randint(4, VOCABULARY, (batch, length), generator=source) for _ in range(3))
    return {"input_ids": first, "attention_mask": torch.ones_like(first), "decoder_input_ids": second}, target


def pixels(size: int = 32, batch: int = 4) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return images by the name that transformers gives them, and their classes."""
    x, y = images(size, batch)
    return {"pixel_values": x}, y


def captions(size: int = 32, batch: int = 4, length: int = 12) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return images with a text each, and which text belongs to which image."""
    named, _ = sentences(batch, length)
    return {**named, "pixel_values": images(size, batch)[0]}, torch.arange(batch)


def waveforms(samples: int = 1600, batch: int = 2) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return sound and its classes."""
    source = generator()
    x = torch.randn(batch, samples, generator=source)
    return {"input_values": x}, torch.randint(CLASSES, (batch,), generator=source)


def spectra(bins: int = 16, frames: int = 40, batch: int = 2, length: int = 8) -> tuple[Mapping[str, Tensor], Tensor]:
    """Return log-mel spectra, the transcript so far, and the token that follows each of its tokens."""
    source = generator()
    x = torch.randn(batch, bins, frames, generator=source)
    tokens, target = (torch.randint(4, VOCABULARY, (batch, length), generator=source) for _ in range(2))
    return {"input_features": x, "decoder_input_ids": tokens}, target


def volumes(*sizes: int, channels: int = 1, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return images of one, two or three dimensions, one channel each, and a class for every voxel."""
    source = generator()
    x = torch.randn(batch, channels, *sizes, generator=source)
    return x, torch.randint(CLASSES, (batch, *sizes), generator=source)


def targets_of(shape: tuple[int, ...]) -> Tensor:
    """Return noise that an output of that shape is to become."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))
