"""Forward time of the stripped net beside the original model, in eval mode.

python benchmarks/inference.py --json benchmarks/results/inference.json
"""

from __future__ import annotations

import torch
import torchvision.models as zoo
from common import goal, options, report

import sedona_fx
from sedona_fx.measure import step_seconds


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__, repeats=60, batch=16)
    torch.manual_seed(0)
    models = {
        "CIFAR ResNet-110": (sedona_fx.models.resnet110(num_classes=10), 32),
        "ResNet-50": (zoo.resnet50(), 64),
        "DenseNet-121": (zoo.densenet121(), 64),
        "MobileNet v3 small": (zoo.mobilenet_v3_small(), 64),
    }
    rows, goals = [], []
    for name, (model, size) in models.items():
        x = torch.randn(chosen.batch, 3, size, size)
        y = torch.zeros(chosen.batch, dtype=torch.long)
        stripped = sedona_fx.decouple(model, (x, y), search="balanced", progress=False).inference_module()
        model.eval()
        with torch.no_grad():
            seconds = step_seconds(
                {"original": lambda: model(x), "stripped": lambda: stripped(x)},  # noqa: B023
                repeats=chosen.repeats,
                warmup=3,
            )
        ratio = seconds["stripped"] / seconds["original"]
        rows.append({"model": name, **{f"{k}, ms": 1000 * v for k, v in seconds.items()}, "ratio": ratio})
        goals.append(goal(f"{name}: stripped / original", ratio, 1.02))
    title = f"forward in eval mode, batch {chosen.batch}, {chosen.threads} threads, median of {chosen.repeats}"
    report(rows, goals, chosen, title)


if __name__ == "__main__":
    main()
