"""A part of CIFAR-10, read as people keep it, and batches of it that are the same for everybody."""

from __future__ import annotations

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sedona_fx.train import block_seed

ARCHIVE = "cifar10-jpeg.tar.xz"
Images = tuple[Tensor, Tensor]
"""Images (N, 3, H, W), float, and labels (N,)."""
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar10(root: Path, train: int, test: int) -> tuple[Images, Images]:
    """Return the first images of each class, `train` and `test` in all, normalised.

    Args:
        root: a folder with the archive ``cifar10-jpeg.tar.xz``, with images (``train/<class>/*``, ``test/<class>/*``),
            or as torchvision's ``CIFAR10`` lays it out.
        train: images to train on, a multiple of 10.
        test: images to test on, a multiple of 10.

    Raises:
        SystemExit: there is no CIFAR-10.
    """
    wanted = {"train": train // 10, "test": test // 10}
    if (root / ARCHIVE).exists():
        parts = _from_archive(root / ARCHIVE, wanted)
    elif (root / "train").is_dir() and (root / "test").is_dir():
        parts = {part: _from_folders(root / part, count) for part, count in wanted.items()}
    elif (root / "cifar-10-batches-py").is_dir():
        parts = {part: _from_torchvision(root, part == "train", count) for part, count in wanted.items()}
    else:
        raise SystemExit(
            f"There is no CIFAR-10 in {root}: hand --data a folder with {ARCHIVE}, with train/<class>/* and "
            "test/<class>/*, or with torchvision's cifar-10-batches-py. Nothing is downloaded."
        )
    return _tensors(*parts["train"]), _tensors(*parts["test"])


@dataclass
class Batches:
    """Full batches in an order, cropped (after padding with zeros) and flipped; all drawn from (seed, epoch)."""

    images: Tensor
    labels: Tensor
    size: int
    seed: int
    pad: int = 4
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.images) // self.size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; ``fit`` calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(block_seed(self.seed, -1, self.epoch))
        count, (height, width) = len(self) * self.size, self.images.shape[2:]
        order = torch.randperm(len(self.images), generator=generator)[:count]
        padded = torch.nn.functional.pad(self.images, [self.pad] * 4)
        corners = torch.randint(0, 2 * self.pad + 1, (2, count, 1), generator=generator)
        flips = torch.rand(count, 1, generator=generator) < 0.5
        rows, columns = torch.arange(height) + corners[0], torch.arange(width) + corners[1]
        columns = torch.where(flips, columns.flip(1), columns)
        for start in range(0, count, self.size):
            part = slice(start, start + self.size)
            chosen = order[part, None, None]
            # (N, H, W, C): an index of each dimension but the channels puts these last
            cropped = padded[chosen, :, rows[part, :, None], columns[part, None, :]]
            yield cropped.permute(0, 3, 1, 2).contiguous(), self.labels[order[part]]


def _from_archive(archive: Path, wanted: dict[str, int]) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Return the first images of each class in the order of their names, and the names of their classes."""
    with tarfile.open(archive) as opened:
        found = defaultdict(list)
        for member in opened:
            path = Path(member.name)
            if member.isfile() and len(path.parts) >= 3 and path.parts[-3] in wanted:
                found[path.parts[-3], path.parts[-2]].append(member)
        chosen = [
            (part, name, member)
            for (part, name), members in sorted(found.items())
            for member in sorted(members, key=lambda member: member.name)[: wanted[part]]
        ]
        decoded = {}  # in the order of the archive: going back in it would unpack it again
        for _, _, member in sorted(chosen, key=lambda entry: entry[2].offset):
            with opened.extractfile(member) as file:
                decoded[member.name] = np.asarray(Image.open(file).convert("RGB"))
    return {
        part: (
            [decoded[member.name] for p, _, member in chosen if p == part],
            [name for p, name, _ in chosen if p == part],
        )
        for part in wanted
    }


def _from_folders(folder: Path, count: int) -> tuple[list[np.ndarray], list[str]]:
    files = [file for name in sorted(folder.iterdir()) if name.is_dir() for file in sorted(name.iterdir())[:count]]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files], [file.parent.name for file in files]


def _from_torchvision(root: Path, train: bool, count: int) -> tuple[list[np.ndarray], list[str]]:
    from torchvision.datasets import CIFAR10

    raw = CIFAR10(str(root), train=train)
    labels = np.asarray(raw.targets)
    chosen = [k for label in range(10) for k in np.flatnonzero(labels == label)[:count]]
    return [raw.data[k] for k in chosen], [raw.classes[labels[k]] for k in chosen]


def _tensors(images: list[np.ndarray], names: list[str]) -> Images:
    """Return images and labels, the classes numbered in the order of their names."""
    classes = sorted(set(names))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (pixels - mean) / std, torch.tensor([classes.index(name) for name in names])
