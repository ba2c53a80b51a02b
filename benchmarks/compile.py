"""How long the compiler takes: model to blocks (balanced cuts, K = 4, no search), beside PyTorch's pipeline splitter.

    python benchmarks/compile.py --json benchmarks/results/compile.json

Everything is in the time: the copy, both traces, the forwards and comparisons that prove them, both analyses, heads,
lowering and partitioning. Models are built beforehand, with the small inputs of the support table; "forwards" is what
the four forwards of the proof take by themselves. ``torch.distributed.pipelining.pipeline`` splits the same models at
the same places, where these are ends of modules; it captures one mode, analyses nothing and makes no heads.

A chain of layers shows how time grows with the number of nodes.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from catalogue import Entry, catalogue
from common import goal, options, report
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline

import sedona_fx
from sedona_fx.ir.graph import cut_points
from sedona_fx.report import table

NAMES = (
    *("alexnet", "vgg11", "resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2", "densenet121"),
    *("googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("efficientnet_v2_s", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "convnext_tiny", "swin_t"),
    *("vit_b_16", "maxvit_t", "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    *("r3d_18", "s3d", "swin3d_t", "mvit_v2_s"),
)
"""One or two of every family of torchvision's, the slowest to compile among them."""
CHAIN = (1000, 4000, 16000)


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__, repeats=1)
    warnings.simplefilter("ignore")
    rows = []
    for key, entry in catalogue().items():
        if key.startswith("torchvision") and entry.name in NAMES:
            rows.append(_row(entry, chosen.repeats))
            print(f"{entry.name}: {rows[-1]['seconds']:.2f} s", flush=True)
    chains = [_chain(nodes, chosen.repeats) for nodes in CHAIN]
    seconds = {row["model"]: row["seconds"] for row in rows}
    goals = [
        goal("median over torchvision, seconds", statistics.median(seconds.values()), 0.5),
        goal("mvit_v2_s, seconds", seconds["mvit_v2_s"], 5.0),
        goal("maxvit_t, seconds", seconds["maxvit_t"], 5.0),
        goal("slowest, seconds", max(seconds.values()), 5.0),
        goal("chain, 16,000 against 1,000 nodes, over n log n", _growth(chains), 1.0),
    ]
    print("\n" + table(["chain, nodes", "seconds"], [[str(c["nodes"]), f"{c['seconds']:.2f}"] for c in chains]))
    report(
        [*rows, *({"model": f"chain of {c['nodes']} nodes", **c} for c in chains)],
        goals,
        chosen,
        f"model to blocks, balanced, K = 4, median of {chosen.repeats}, {chosen.threads} threads",
    )


def _row(entry: Entry, repeats: int) -> dict[str, Any]:
    model, pair = entry.make(), entry.pair()
    how = {"blocks": 4, **entry.options, "loss": entry.criterion, "search": "balanced", "progress": False}
    seconds = _median(lambda: sedona_fx.decouple(model, pair, **how), repeats)
    net = sedona_fx.decouple(model, pair, **how)
    graph = net.graph_module.graph
    return {
        "model": entry.name,
        "nodes": len(graph.nodes),
        "legal cuts": sum(1 for _ in cut_points(graph)),
        "base layers": len(net.plan.base_layers),
        "million parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "seconds": seconds,
        "forwards": _forwards(model, pair[0]),
        "pipelining": _pipelining(model, pair[0], net.plan.cuts),
    }


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for turn in range(repeats + 1):  # the first warms PyTorch's caches up
        start = time.perf_counter()
        call()
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _forwards(model: nn.Module, inputs: torch.Tensor) -> float:
    model, few = copy.deepcopy(model), inputs[:2]
    start = time.perf_counter()
    for training in (True, True, False, False):
        model.train(training)(few)
    return time.perf_counter() - start


def _pipelining(model: nn.Module, inputs: torch.Tensor, cuts: tuple[str, ...]) -> float | str:
    """Return the seconds of PyTorch's splitter for the same cuts, or how it fails."""
    spec = {path: SplitPoint.END for path in cuts if path in dict(model.named_modules())}
    if len(spec) < len(cuts):
        return "a cut is no end of a module"
    model = copy.deepcopy(model)
    start = time.perf_counter()
    try:
        pipeline(model, (inputs,), split_spec=spec)
    except Exception as error:
        return f"{type(error).__name__}"
    return time.perf_counter() - start


def _chain(nodes: int, repeats: int) -> dict[str, Any]:
    """Compile a chain of linear layers and activations, two nodes each."""
    layers = [layer for _ in range(nodes // 2) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model, pair = nn.Sequential(*layers[:-2], nn.Linear(8, 3)), (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    how = {"blocks": 4, "search": "balanced", "heads": "linear", "progress": False}
    return {"nodes": nodes, "seconds": _median(lambda: sedona_fx.decouple(model, pair, **how), repeats)}


def _growth(chains: list[dict[str, Any]]) -> float:
    """Return how much faster than n log n the time grows from the shortest chain to the longest; 1 is n log n."""
    short, long = chains[0], chains[-1]
    n, m = short["nodes"], long["nodes"]
    return (long["seconds"] / short["seconds"]) / (m * math.log(m) / (n * math.log(n)))


if __name__ == "__main__":
    main()
