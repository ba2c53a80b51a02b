"""What the default search costs in fact, beside the plain training steps that it is allowed.

    python benchmarks/guided_cost.py --threads 1 --json benchmarks/results/guided_cost.json --page docs/search.md

The search counts its cost before it starts, by FLOPs, bytes and operators, and reads no clock, so that it decides the
same every time. Here a clock is read: CPU seconds of the search with an allowance that pays for some comparisons and an
epoch of rollouts, against as many plain training steps of the same net on the same batches.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from captured import captured
from common import goal, options, report
from page import fill, markdown
from plan_table import HEADS, SETTINGS
from torch import Tensor, nn

import sedona_fx
from sedona_fx.search import Guided
from sedona_fx.search.trials.effort import Effort

NO_PAGE = Path("-")
BATCHES = 4
"""So short is an epoch that rollouts pay."""


@dataclass(frozen=True)
class Net:
    """A net, its images (N, C, H, W), and what it is cut with."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    blocks: int = 4
    heads: Any = None


def _of_table(name: str) -> Net:
    setting = SETTINGS[name]
    return Net(f"{name} net of the tables", lambda: setting.model(0), (128, 3, setting.size, setting.size), 3, HEADS)


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 4, 6, 4, 64, 128, num_classes=10)


NETS = [
    *map(_of_table, SETTINGS),
    Net("ResNet-32", lambda: sedona_fx.models.resnet32(num_classes=10), (128, 3, 32, 32)),
    Net("VGG-19, quarter width", lambda: sedona_fx.models.vgg19(num_classes=10, width=0.25), (128, 3, 32, 32)),
    Net("ViT, 6 layers of 64", _vit, (64, 3, 32, 32)),
    Net("ResNet-18", lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 96, 96)),
]


def row_of(net: Net, repeats: int) -> dict[str, Any]:
    """Search once, and time plain steps before and after it."""
    torch.manual_seed(0)
    data = [(torch.randn(net.shape), torch.randint(10, net.shape[:1])) for _ in range(BATCHES)]
    model, val_data = net.make(), [(x.clone(), y) for x, y in data]
    problem = captured(model, data, val_data=val_data, blocks=net.blocks, heads=net.heads)
    allowed = 4 * Effort.of(problem, problem.places(), 1).least
    steps = plain_steps(model, data, repeats)
    began = time.process_time()
    found = Guided(training_steps=allowed, val_batches=1).decide(problem).provenance["cost"]
    seconds = time.process_time() - began
    step = statistics.median([*steps, *plain_steps(model, data, repeats)])
    return {
        "net": net.name,
        "batch": net.shape[0],
        "ms a plain step": 1000 * step,
        "steps allowed": allowed,
        "counted": math.ceil(found["equivalent_steps"]),
        "measured": seconds / step,
        "measured / allowed": seconds / step / allowed,
        "steps of rollouts": found["rollout_steps"],
    }


def plain_steps(model: nn.Module, data: list[tuple[Tensor, Tensor]], repeats: int) -> list[float]:
    """Return the CPU seconds of plain training steps."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    seconds = []
    for x, y in (data * repeats)[: repeats + 1]:
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return seconds[1:]


def main(chosen: argparse.Namespace) -> None:
    """Measure and print."""
    rows = []
    for net in NETS:
        rows.append(row_of(net, chosen.repeats))
        print(rows[-1], flush=True)
    goals = [goal(f"{row['net']}: measured / allowed", row["measured / allowed"], 1.0) for row in rows]
    title = f"the default search, {chosen.threads} thread{'s' if chosen.threads > 1 else ''}, CPU seconds"
    report(rows, goals, chosen, title)
    if chosen.page != NO_PAGE:
        lines = [
            [
                row["net"],
                str(row["batch"]),
                f"{row['ms a plain step']:.0f}",
                str(row["steps allowed"]),
                str(row["counted"]),
                f"{row['measured']:.0f}",
                f"{row['measured / allowed']:.2f}",
            ]
            for row in rows
        ]
        fill(chosen.page, "guided-cost", markdown(list(rows[0])[:-1], lines))


if __name__ == "__main__":
    main(options(__doc__, repeats=5, page=NO_PAGE))
