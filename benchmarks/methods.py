"""Every method on real images: VGG-11 of a quarter's width on a part of CIFAR-10, K = 4, from the same first weights.

    python benchmarks/methods.py --json benchmarks/results/methods.json --page docs/methods.md

5,000 training images and 2,000 test images, uniform cuts of two base layers a block, the default heads (``mlp-sr``),
SGD with momentum and a cosine, crops and flips that are the same for every method. A few epochs: enough to see that all
of them learn, too few to rank them by accuracy. The methods train one after the other, so their seconds are only
comparable on a quiet machine; ``benchmarks/memory.py`` measures time with the ways taking turns.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cifar import Batches, Images, cifar10
from common import goal, options, report
from page import fill, markdown
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import sedona_fx
from sedona_fx.train import (
    BackLink,
    Backprop,
    Delayed,
    Greedy,
    History,
    InfoPro,
    KineticEnergy,
    PredSim,
    Replay,
    Schedule,
)

BLOCKS = 4
FALLS = 0.95
"""What the training loss of every block has come to by the last epoch, beside the first, at most."""
Method = Callable[[sedona_fx.Net, Callable[..., torch.optim.Optimizer]], Schedule]
SLOW = (0.0, 0.0, 0.5, 0.0)
"""Noise: the third worker takes half of its turns."""

METHODS: dict[str, Method] = {
    "Backprop": Backprop,
    "Greedy": Greedy,
    "BackLink, reach 1": lambda net, optimizer: BackLink(net, optimizer, reach=1),
    "BackLink, reach 2": lambda net, optimizer: BackLink(net, optimizer, reach=2),
    "Replay": lambda net, optimizer: Replay(net, optimizer, capacity=4),
    "Replay, one slow worker": lambda net, optimizer: Replay(net, optimizer, capacity=4, noise=SLOW),
    "Replay, one slow worker, int8": lambda net, optimizer: Replay(
        net, optimizer, capacity=4, noise=SLOW, codec="int8"
    ),
    "Delayed, stashed (DDG)": Delayed,
    "Delayed, current (Features Replay)": lambda net, optimizer: Delayed(net, optimizer, weights="current"),
    # The paper has keep=0.01 and Adam, to which a factor of all of a head's gradients is nothing; to SGD it is.
    "Greedy + PredSim": lambda net, optimizer: Greedy(net, optimizer, extra=[PredSim(0.99)]),
    "Greedy + InfoPro": lambda net, optimizer: Greedy(net, optimizer, extra=[InfoPro(1.0)]),
    "Greedy + KineticEnergy": lambda net, optimizer: Greedy(net, optimizer, extra=[KineticEnergy(0.1)]),
}


def main() -> None:
    """Train and print."""
    root = Path(__file__).resolve().parents[1] / "../shared/data"
    given = {"data": root, "page": Path(), "epochs": 6, "seeds": 1, "batch": 128, "train": 5000, "test": 2000}
    chosen = options(__doc__, lr=0.02, **given)
    train, test = cifar10(chosen.data, chosen.train, chosen.test)
    model = sedona_fx.models.vgg11
    how = {"epochs": chosen.epochs, "batch": chosen.batch, "lr": chosen.lr, "seeds": range(chosen.seeds)}
    rows = compare(METHODS, lambda: model(num_classes=10, width=0.25), train, test, **how)
    what = f"VGG-11 of a quarter's width, {len(train[0]):,} images of CIFAR-10, K = {BLOCKS}, batch {chosen.batch}"
    counts = {"epoch": chosen.epochs, "seed": chosen.seeds, "thread": chosen.threads}
    title = ", ".join([what, *(f"{count} {name}{'s'[: count > 1]}" for name, count in counts.items())])
    report(rows, goals(rows), chosen, title)
    if chosen.page != Path():
        fill(chosen.page, "methods", page(rows, title))


def compare(
    methods: Mapping[str, Method],
    build: Callable[[], nn.Module],
    train: Images,
    test: Images,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Train by every method, and return a row for each; numbers are means over the seeds.

    The rows of a seed begin with the same model, heads and batches. "training loss" is that of the model's own output;
    "falls to" is the last epoch's local loss beside the first one's, of the block for which that is largest.
    """
    runs: dict[str, list[History]] = {name: [] for name in methods}
    for seed in seeds:
        torch.manual_seed(seed)
        pair = train[0][:batch], train[1][:batch]
        net = sedona_fx.decouple(build(), pair, blocks=BLOCKS, search="uniform", seed=seed, progress=False)
        for name, method in methods.items():
            print(f"seed {seed}: {name}", flush=True)
            runs[name].append(_train(copy.deepcopy(net), method, train, test, epochs, batch, lr, seed))
    first = _seconds(next(iter(runs.values())))
    return [_row(name, histories, first) for name, histories in runs.items()]


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one goal a method: the training loss of every block falls."""
    return [goal(f"{row['method']}: training loss, last epoch beside first", row["falls to"], FALLS) for row in rows]


def page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Return the rows as a table in Markdown."""
    head = ["method", "training loss by epoch", "test accuracy by epoch, %", "seconds an epoch", "times backprop"]
    lines = []
    for row in rows:
        accuracies = ", ".join(f"{value:.1f}" for value in row["test accuracy, %"])
        spread = f" ± {row['spread']:.1f}" if "spread" in row else ""
        losses = ", ".join(f"{value:.2f}" for value in row["training loss"])
        times = [f"{row['seconds an epoch']:.2f}", f"{row['times backprop']:.2f}"]
        lines.append([row["method"], losses, accuracies + spread, *times])
    return f"{title}.\n\n{markdown(head, lines)}"


def _train(
    net: sedona_fx.Net, method: Method, train: Images, test: Images, epochs: int, batch: int, lr: float, seed: int
) -> History:
    loader = Batches(*train, size=batch, seed=seed)
    steps = epochs * len(loader)
    return sedona_fx.fit(
        net,
        loader,
        epochs=epochs,
        schedule=method(net, lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=5e-4)),
        val_loader=list(zip(test[0].split(500), test[1].split(500), strict=True)),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, steps),
        lr_interval="step",
        seed=seed,
        progress=False,
    )


def _row(name: str, histories: Sequence[History], first: float) -> dict[str, Any]:
    by_epoch = list(zip(*(history.epochs for history in histories), strict=True))
    final = [100 * (history.epochs[-1].val_accuracy or 0.0) for history in histories]
    ratios = [
        statistics.mean(pair)
        for pair in zip(*(map(_ratio, h.epochs[0].losses, h.epochs[-1].losses) for h in histories), strict=True)
    ]
    return {
        "method": name,
        "training loss": [round(statistics.mean(e.losses[-1] for e in epochs), 4) for epochs in by_epoch],
        "falls to": max(ratios),
        "test accuracy, %": [
            round(100 * statistics.mean(e.val_accuracy or 0.0 for e in epochs), 2) for epochs in by_epoch
        ],
        **({"spread": statistics.stdev(final)} if len(final) > 1 else {}),
        "seconds an epoch": _seconds(histories),
        "times backprop": _seconds(histories) / first,
    }


def _ratio(before: float, after: float) -> float:
    return after / before


def _seconds(histories: Sequence[History]) -> float:
    """Return the median seconds of an epoch."""
    return statistics.median(epoch.seconds for history in histories for epoch in history.epochs)


if __name__ == "__main__":
    main()
