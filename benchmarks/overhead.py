"""What a step costs beside its arithmetic: Greedy against a loop written by hand, on nets of 16 channels.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json

The loop by hand has the same blocks, heads, optimizers and losses, and does nothing else: it checks no number, keeps no
seed of its own, and names nothing. Processor time of one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import goal, options, report
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.train import Greedy

WIDTH, LAYERS, BATCH, CLASSES = 16, 16, 32, 10
BLOCKS = (4, 16)
BOUND = 1.25


def layer(normed: bool) -> nn.Sequential:
    """Return one of the 16 layers."""
    parts = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)] if normed else [nn.Linear(WIDTH, WIDTH)]
    return nn.Sequential(*parts, nn.ReLU())


def make(normed: bool) -> nn.Sequential:
    """Return a net of 16 layers; the last has the classifier in it."""
    torch.manual_seed(0)
    layers = [layer(normed) for _ in range(LAYERS)]
    layers[-1].append(nn.Linear(WIDTH, CLASSES))
    return nn.Sequential(*layers)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a block."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def by_hand(model: nn.Sequential, heads: list[nn.Module], blocks: int) -> Callable[[Any, Any], None]:
    """Return a step of decoupled greedy learning in plain PyTorch."""
    size = LAYERS // blocks
    stretches = [model[k * size : (k + 1) * size] for k in range(blocks)]
    optimizers = [
        sgd([*stretch.parameters(), *(heads[k].parameters() if k < len(heads) else ())])
        for k, stretch in enumerate(stretches)
    ]

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        for k, (stretch, optimizer) in enumerate(zip(stretches, optimizers, strict=True)):
            out = stretch(x)
            loss = F.cross_entropy(heads[k](out) if k < len(heads) else out, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            x = out.detach()

    return step


def backprop(model: nn.Module) -> Callable[[Any, Any], None]:
    """Return a step of backpropagation."""
    optimizer = sgd(model.parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Callable[[Any, Any], Any]], rounds: int, count: int) -> dict[str, float]:
    """Return the median milliseconds of processor time of each kind of step; the kinds take turns."""
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(count):
                step(x, y)
            if turn:  # the first warms up
                seconds[name].append((time.process_time() - start) / count)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print the table, and write it if asked."""
    chosen = options(__doc__, rounds=11, count=20)
    torch.set_num_threads(1)
    chosen.threads = 1
    rows, goals = [], []
    for normed in (True, False):
        for blocks in BLOCKS:
            model = make(normed)
            size = LAYERS // blocks
            cuts = [str(k * size - 1) for k in range(1, blocks)]
            data = (torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,)))
            net = sedona_fx.decouple(model, data, cuts=cuts, heads="linear")
            heads = [copy.deepcopy(block.head) for block in net.blocks[:-1]]
            steps = {
                "backprop": backprop(make(normed)),
                "by hand": by_hand(make(normed), heads, blocks),
                "Greedy": Greedy(net, sgd).step,
            }
            found = measure(steps, chosen.rounds, chosen.count)
            ratio = found["Greedy"] / found["by hand"]
            kind = "with BatchNorm" if normed else "without"
            rows.append({"layers": kind, "K": blocks, **{f"{n} (ms)": v for n, v in found.items()}, "ratio": ratio})
            goals.append(goal(f"Greedy / by hand, K = {blocks}, {kind}", ratio, BOUND))
    report(rows, goals, chosen, "Processor time of a step, 16 layers of 16 channels, batch 32")


if __name__ == "__main__":
    main()
