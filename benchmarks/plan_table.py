"""Train every plan of a small net: what searches are judged by.

    python benchmarks/plan_table.py --setting conv --seeds 0 1 2 3 4 --table benchmarks/results/plans_conv.json

CIFAR-10 at 16x16, K = 3, two kinds of head, all 21 x 4 plans of 8 base layers (``--setting residual``: at 8x8, half of
the images, all 36 x 4 plans of 9; ``--setting pooled``: another net, on other images, 12 epochs), trained
greedily from the same first weights on the same batches; blocks that plans have in common are trained once. Of every
plan the table holds loss and accuracy on held-out images at a few steps on the way, and the accuracy on the test images
at the end. A seed is kept as soon as it is done, and a further call, or one beside it, goes on with the others; one
takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captured import captured
from cifar import Batches, Images, cifar10
from torch import Tensor, nn
from tqdm import tqdm

from sedona_fx.files import replacing
from sedona_fx.heads.context import HeadContext
from sedona_fx.search.problem.problem import Choice, Problem
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.proposals import proposals
from sedona_fx.train import block_seed

BLOCKS = 3
BATCH = 128
LR, FINAL_LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.0005, 0.9, 1e-4
MARKS = (5, 10, 20, 40, 78)
"""Steps after which the plans are looked at, besides the ends of the later epochs."""


def conv_head(context: HeadContext) -> nn.Module:
    """Return the second kind of head: one convolution more than ``linear`` has."""
    channels, classes = context.channels, context.output_shape[1]
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


HEADS = ["linear", conv_head]


def conv_layers() -> list[nn.Module]:
    """Return 8 base layers of 3x3 convolutions and a classifier."""
    widths, strides = [3, 16, 16, 16, 16, 32, 32, 32, 32], [1, 2, 1, 1, 2, 1, 1, 1]
    layers = [conv_bn_relu(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False)]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]


def residual_layers() -> list[nn.Module]:
    """Return 8 residual base layers and a classifier."""
    widths, strides = [3, 16, 16, 16, 32, 32, 32, 32, 32], [1, 1, 1, 2, 1, 1, 2, 1]
    layers = [Residual(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False)]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]


def pooled_layers() -> list[nn.Module]:
    """Return 8 base layers of 3x3 convolutions, wider each time that they are pooled, and a classifier."""
    widths, pooled = [3, 8, 8, 16, 16, 32, 32, 32, 32], [False, True, False, True, False, True, False, False]
    layers = [
        nn.Sequential(*conv_bn_relu(a, b, 1), *([nn.MaxPool2d(2)] if pool else []))
        for a, b, pool in zip(widths, widths[1:], pooled, strict=False)
    ]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]


@dataclass(frozen=True)
class Setting:
    """A net and its data; `first` images of each class are left to the other settings."""

    layers: Callable[[], list[nn.Module]]
    train: int
    epochs: int
    size: int = 16
    first: int = 0
    held_out: int = 2000
    test: int = 10_000

    def model(self, seed: int) -> nn.Sequential:
        """Return the net with the weights of a seed."""
        torch.manual_seed(seed)
        return nn.Sequential(*self.layers())

    def data(self, root: Path) -> tuple[Images, Images, Images]:
        """Return training, held-out and test images."""
        known, test = cifar10(root, 10 * self.first + self.train + self.held_out, self.test)
        shrink = nn.AvgPool2d(32 // self.size)
        each = self.first + (self.train + self.held_out) // 10
        place = torch.arange(len(known[1])) % each  # the images lie class by class
        images, labels = shrink(known[0])[place >= self.first], known[1][place >= self.first]
        trains = place[place >= self.first] < self.first + self.train // 10
        return (images[trains], labels[trains]), (images[~trains], labels[~trains]), (shrink(test[0]), test[1])


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn_relu(inside, outside, stride)
        self.second = nn.Sequential(nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside))
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch + shortcut)."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def conv_bn_relu(inside: int, outside: int, stride: int) -> nn.Sequential:
    """Return one 3x3 convolution with its norm and activation."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


SETTINGS = {
    "conv": Setting(conv_layers, train=10_000, epochs=8),
    "residual": Setting(residual_layers, train=5_000, epochs=6, size=8),
    "pooled": Setting(pooled_layers, train=10_000, epochs=12, first=1200),
}


def problem_of(setting: Setting, images: Images, seed: int) -> Problem:
    """Return the problem of cutting the net of a setting."""
    batches = [(images[0][k : k + BATCH], images[1][k : k + BATCH]) for k in (0, BATCH)]
    return captured(setting.model(seed), batches, blocks=BLOCKS, heads=HEADS, seed=seed)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: a cosine from `LR` to `FINAL_LR`."""
    return FINAL_LR + (LR - FINAL_LR) * (1 + math.cos(math.pi * step / steps)) / 2


def train_all(setting: Setting, seed: int, data: tuple[Images, Images, Images]) -> list[dict[str, Any]]:
    """Train every plan; return one row a plan."""
    train, held_out, test = data
    problem = problem_of(setting, train, seed)
    plans = proposals(problem, 10_000)
    tree = PlanTree(
        problem,
        plans,
        lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
        lambda last, local, target: nn.functional.cross_entropy(local, target),
        torch.device("cpu"),
    )
    batches = Batches(*train, size=BATCH, seed=block_seed(seed, -2, 0), pad=2)
    steps = setting.epochs * len(batches)
    marks = {*(m for m in MARKS if m < steps), *range(2 * len(batches), steps + 1, len(batches))}
    at: dict[Choice, dict[int, list[float]]] = defaultdict(dict)
    done = 0
    with tqdm(total=steps, desc=f"seed {seed}: {len(plans)} plans", mininterval=10) as bar:
        for epoch in range(setting.epochs):
            batches.set_epoch(epoch)
            for x, y in batches:
                for node in tree.nodes():
                    node.optimizer.param_groups[0]["lr"] = learning_rate(done, steps)
                tree.train(({"input": x}, y), done)
                done += 1
                bar.update()
                if done in marks:
                    for plan, (loss, accuracy) in scores(tree, held_out).items():
                        at[plan][done] = [round(loss, 5), round(accuracy, 5)]
    final = scores(tree, test)
    return [
        {"plan": [[place, head] for place, head in plan], "at": at[plan], "test": round(final[plan][1], 5)}
        for plan in plans
    ]


def scores(tree: PlanTree, images: Images) -> dict[Choice, tuple[float, float]]:
    """Return loss and accuracy of every plan."""
    loss, right = dict.fromkeys(tree.plans(), 0.0), dict.fromkeys(tree.plans(), 0.0)
    for x, y in _chunks(images):
        for plan, output in tree.outputs({"input": x}):
            loss[plan] += nn.functional.cross_entropy(output, y, reduction="sum").item()
            right[plan] += (output.argmax(1) == y).sum().item()
    return {plan: (loss[plan] / len(images[0]), right[plan] / len(images[0])) for plan in loss}


def _chunks(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images[0].split(500), images[1].split(500), strict=True)


def main() -> None:
    """Train what is not yet in the table, seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", type=Path, required=True, help="JSON; what is there already is kept")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    setting = SETTINGS[chosen.setting]
    data = setting.data(chosen.data)
    for seed in chosen.seeds:
        if str(seed) in _read(chosen.table)["seeds"]:
            continue
        rows = train_all(setting, seed, data)
        known = _read(chosen.table)  # another process may have added a seed
        known["seeds"][str(seed)] = rows
        with replacing(chosen.table) as temporary:
            temporary.write_text(json.dumps({"setting": chosen.setting, **known}) + "\n")


def _read(table: Path) -> dict[str, Any]:
    return json.loads(table.read_text()) if table.exists() else {"seeds": {}}


if __name__ == "__main__":
    main()
