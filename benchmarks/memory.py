"""Peak activation bytes and time of a gradient: ``net.backward`` beside plain backprop, in one run.

    python benchmarks/memory.py --json benchmarks/results/memory.json

CIFAR ResNet-110, memory-balanced cuts. A row is one way to get the gradients of a batch; the ways take turns, so that
a drift of the machine hits all alike. Bytes are counted by following storages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import goal, options, report
from torch.nn.functional import cross_entropy

import sedona_fx
from sedona_fx.cost import step_seconds
from sedona_fx.memory import peak_bytes
from sedona_fx.search import Balanced


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__, repeats=5, batch=128)
    torch.manual_seed(0)
    x, y = torch.randn(chosen.batch, 3, 32, 32), torch.randint(0, 10, (chosen.batch,))
    model = sedona_fx.models.resnet110(num_classes=10)
    ways: dict[str, Callable[[], object]] = {"backprop": lambda: cross_entropy(model(x), y).backward()}
    wanted = [(4, "mlp-sr"), (16, "mlp-sr"), (16, "sedona-1"), (16, "sedona-4")]
    for blocks, head in wanted:
        by = Balanced(by="activation_bytes")
        net = sedona_fx.decouple(model, (x, y), blocks=blocks, search=by, heads=[head], progress=False)
        ways[f"K = {blocks}, {head}"] = lambda net=net: net.backward(x, y)
    for way in ways.values():  # gradients exist before anything is counted
        way()
    peaks = {name: peak_bytes(way) for name, way in ways.items()}
    seconds = step_seconds(ways, repeats=chosen.repeats)
    rows = [
        {
            "way": name,
            "peak MiB": peaks[name] / 2**20,
            "of backprop": f"{100 * peaks[name] / peaks['backprop']:.1f} %",
            "seconds": seconds[name],
            "times backprop": seconds[name] / seconds["backprop"],
        }
        for name in ways
    ]

    def share(name: str) -> float:
        return peaks[name] / peaks["backprop"]

    def slowdown(name: str) -> float:
        return seconds[name] / seconds["backprop"]

    goals = [
        goal("K = 4, mlp-sr: share of bytes", share("K = 4, mlp-sr"), 0.30),
        goal("K = 4, mlp-sr: times backprop", slowdown("K = 4, mlp-sr"), 1.10),
        goal("K = 16, mlp-sr: share of bytes", share("K = 16, mlp-sr"), 0.11),
        goal("K = 16, mlp-sr: times backprop", slowdown("K = 16, mlp-sr"), 1.10),
    ]
    for head in ("sedona-1", "sedona-4"):
        goals.append(goal(f"K = 16, {head}: share of bytes", share(f"K = 16, {head}"), 0.16))
        goals.append(goal(f"K = 16, {head}: times backprop", slowdown(f"K = 16, {head}"), 1.30))
    title = f"gradients of ResNet-110, batch {chosen.batch}, {chosen.threads} threads, median of {chosen.repeats}"
    report(rows, goals, chosen, title)


if __name__ == "__main__":
    main()
