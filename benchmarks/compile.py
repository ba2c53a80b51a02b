"""How long the compiler takes: model to blocks (balanced cuts, K = 4, no search), per model.

    python benchmarks/compile.py --json benchmarks/results/compile.json

Everything is in the time: the copy, both traces, the four forwards that prove them, both analyses, heads, lowering and
partitioning. Models are built beforehand, with small inputs.
"""

from __future__ import annotations

import statistics
import time

import torch
import torchvision.models as zoo
from common import goal, options, report

import sedona_fx
from sedona_fx.graph import cut_points

SIZES = {"inception_v3": 299, "alexnet": 64, "vgg11_bn": 32}
NAMES = (
    "resnet152",
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
    "mnasnet0_5",
)


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__, repeats=3)
    rows = []
    for name in NAMES:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = SIZES.get(name, 64)
        if name == "vit_b_16":
            extra["image_size"] = size
        torch.manual_seed(0)
        model = getattr(zoo, name)(**extra)
        pair = (torch.randn(2, 3, size, size), torch.tensor([0, 1]))
        times = []
        for turn in range(chosen.repeats + 1):  # the first warms PyTorch's caches up
            start = time.perf_counter()
            net = sedona_fx.decouple(model, pair, blocks=4, search="balanced", progress=False)
            if turn:
                times.append(time.perf_counter() - start)
        graph = net.graph_module.graph
        rows.append(
            {
                "model": name,
                "nodes": len(graph.nodes),
                "legal cuts": sum(1 for _ in cut_points(graph)),
                "base layers": len(net.plan.base_layers),
                "million parameters": sum(p.numel() for p in model.parameters()) / 1e6,
                "seconds": statistics.median(times),
            }
        )
        print(f"{name}: {rows[-1]['seconds']:.2f} s", flush=True)
    seconds = {row["model"]: float(row["seconds"]) for row in rows}
    goals = [
        goal("ResNet-152, seconds", seconds["resnet152"], 1.5),
        goal("slowest of the others, seconds", max(v for k, v in seconds.items() if k != "resnet152"), 5.0),
    ]
    report(
        rows, goals, chosen, f"trace to blocks, balanced, K = 4, median of {chosen.repeats}, {chosen.threads} threads"
    )


if __name__ == "__main__":
    main()
