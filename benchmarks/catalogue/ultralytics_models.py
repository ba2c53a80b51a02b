"""Models of ultralytics from the descriptions in the package: classifiers, and detectors without their own losses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from catalogue import batches
from catalogue.entry import Entry, imported

FAMILY = PACKAGE = "ultralytics"
TASKS = "ultralytics.nn.tasks"

CLASSIFIERS = ("yolov8n-cls", "yolo11n-cls", "yolo12n-cls", "yolo26n-cls")
DETECTORS = {
    "yolov5n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov8n-pose": "PoseModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo12n": "DetectionModel",
}


def entries() -> Iterator[Entry]:
    """Yield all of them."""
    for name in CLASSIFIERS:
        yield Entry(
            name,
            FAMILY,
            partial(_build, "ClassificationModel", name),
            partial(batches.images, 64),
            loss=class_loss,
            needs=(PACKAGE,),
        )
    for name, kind in DETECTORS.items():
        yield Entry(
            name,
            FAMILY,
            partial(_build, kind, name),
            partial(batches.images, 64, 2),
            loss=raw_loss,
            options={"heads": False},
            note="without heads; its loss here is a plain function of the raw predictions",
            needs=(PACKAGE,),
        )


def class_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross-entropy of the logits, which stand behind the probabilities in eval mode."""
    return functional.cross_entropy(output if isinstance(output, Tensor) else output[1], target)


def raw_loss(output: Any, target: Tensor) -> Tensor:
    """Return the sum of the squares of what a detector predicts in training."""
    return sum((value**2).mean() for value in _leaves(output))  # type: ignore[return-value]


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    children = list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, (list, tuple)) else []
    return [leaf for child in children for leaf in _leaves(child)]


def _build(kind: str, name: str) -> nn.Module:
    os.environ.setdefault("YOLO_OFFLINE", "true")
    return imported(TASKS, kind, f"{name}.yaml", nc=batches.CLASSES, verbose=False)
