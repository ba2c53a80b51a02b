"""The ways to train that ``benchmarks/memory.py`` compares, on the CIFAR ResNet-110, and how bytes are counted."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint_sequential

import sedona_fx
from sedona_fx.measure import PeakBytes, device_peak_bytes, step_seconds
from sedona_fx.models.resnet import ResNet
from sedona_fx.search import Balanced
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

CAPACITY = 2
"""Batches in a buffer of `Replay`: the least with which a worker has a choice."""
Step = Callable[[], object]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: of its row.
        make: begins anew, and returns what does one step.
        steps: after how many steps as much is kept between steps as ever will be.
        needs: bytes beside plain backprop's, as far as they are known beforehand: some ways do not fit everywhere.
        bound: bytes beside Greedy's by the paper's arithmetic, (n + b)/n for blocks of n base layers, or None. What
            backward itself needs comes on top: gradients on their way through a tail do not free it.
        heads_bytes: parameters of the heads that it trains; they are not in the peak.
    """

    name: str
    make: Callable[[], Step]
    steps: int = 2
    needs: float = 1.0
    bound: float | None = None
    heads_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """What a way took; nothing but ``needed`` where the machine is too small for it."""

    way: Way
    peak: int = 0
    allocator: int | None = None
    seconds: float = 0.0
    needed: int = 0


def plain(model: ResNet, pair: Pair) -> Way:
    """Return the training loop that everybody writes."""
    return Way("plain backprop", lambda: _loop(model, model, pair))


def checkpointing(model: ResNet, pair: Pair, segments: int) -> Way:
    """Return the same loop with ``torch.utils.checkpoint`` over the residual blocks; the last segment keeps its graph.

    The net draws no random numbers, so none are kept for the second forward.
    """
    blocks = nn.Sequential(*(block for name in model.stage_names for block in model.get_submodule(name)))

    def forward(x: Tensor) -> Tensor:
        h = checkpoint_sequential(blocks, segments, model.stem(x), use_reentrant=False, preserve_rng_state=False)
        scores: Tensor = model.fc(model.flatten(model.pool(h)))
        return scores

    return Way(f"checkpoint, {segments} segments", lambda: _loop(model, forward, pair))


def schedule_ways(model: ResNet, pair: Pair, blocks: int) -> list[Way]:
    """Return the schedules without delayed gradients on the same K blocks."""
    net = cut(model, pair, blocks, "mlp-sr")
    heads = heads_bytes(net)
    lengths = [len(layers) for layers in net.variants.base_layers()]
    shortest = min(lengths[:-1])  # of those with a tail; the last block has none
    kinds: list[tuple[str, type[Any], dict[str, Any], dict[str, Any]]] = [
        ("Backprop", Backprop, {}, {}),
        ("Greedy", Greedy, {}, {"heads_bytes": heads}),
        ("BackLink, reach 1", BackLink, {"reach": 1}, {"heads_bytes": heads, "bound": (shortest + 1) / shortest}),
        ("Replay", Replay, {"capacity": CAPACITY}, {"heads_bytes": heads, "steps": CAPACITY + 2}),
    ]
    return [Way(name, _starter(net, kind, pair, **options), **about) for name, kind, options, about in kinds]


def delayed_ways(model: ResNet, pair: Pair, blocks: int) -> list[Way]:
    """Return delayed gradients on the same K blocks: DDG and Features Replay."""
    net = cut(model, pair, blocks, "mlp-sr")
    ways: list[tuple[Literal["stashed", "current"], float]] = [
        ("stashed", (blocks - 1) / 2 + 1 / blocks),
        ("current", 1.0),
    ]
    return [
        Way(f"Delayed, {weights}", _starter(net, Delayed, pair, weights=weights), steps=blocks + 2, needs=needs)
        for weights, needs in ways
    ]


def head_ways(model: ResNet, pair: Pair, blocks: int, heads: Sequence[str]) -> list[Way]:
    """Return Greedy on K blocks with other heads than those of :func:`schedule_ways`."""
    nets = {head: cut(model, pair, blocks, head) for head in heads}
    return [
        Way(f"Greedy, {head}", _starter(net, Greedy, pair), heads_bytes=heads_bytes(net)) for head, net in nets.items()
    ]


def measure(ways: Sequence[Way], repeats: int, device: torch.device) -> list[Measured]:
    """Return bytes and seconds of some ways, which take turns. The first one must fit; all stay alive together."""
    peaks: dict[str, tuple[int, int | None]] = {}
    steps: dict[str, Step] = {}
    needed: dict[str, int] = {}
    for way in ways:
        expected = int(way.needs * peaks[ways[0].name][0]) if peaks else 0
        if expected > machine_bytes(device) / 2:
            needed[way.name] = expected
            continue
        gc.collect()
        before = _reset_peak(device)
        with PeakBytes() as meter:
            steps[way.name] = way.make()
            for _ in range(way.steps):
                steps[way.name]()
        found = device_peak_bytes(device)
        peaks[way.name] = (meter.peak, found - before if found is not None else None)
    seconds = step_seconds(steps, repeats=repeats)
    return [
        Measured(way, *peaks[way.name], seconds=seconds[way.name])
        if way.name in steps
        else Measured(way, needed=needed[way.name])
        for way in ways
    ]


def cut(model: nn.Module, pair: Pair, blocks: int, head: str) -> sedona_fx.Net:
    """Return the net with memory-balanced cuts."""
    by = Balanced(by="activation_bytes")
    return sedona_fx.decouple(model, pair, blocks=blocks, search=by, heads=[head], progress=False)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer without a state, so that there is none to count; the data are noise, so it goes slowly."""
    return torch.optim.SGD(parameters, lr=1e-3)


def heads_bytes(net: sedona_fx.Net) -> int:
    """Return the bytes of the heads' parameters."""
    return sum(p.numel() * p.element_size() for p in net.heads.parameters())


def machine_bytes(device: torch.device) -> int:
    """Return how much memory a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def wait(device: torch.device) -> None:
    """Wait for what an accelerator still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loop(model: nn.Module, forward: Callable[[Tensor], Tensor], pair: Pair) -> Step:
    optimizer = sgd(model.parameters())

    def step() -> None:
        cross_entropy(forward(pair[0]), pair[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(pair[0].device)

    return step


def _starter(net: sedona_fx.Net, kind: type[Any], pair: Pair, **options: Any) -> Callable[[], Step]:
    return lambda: _steps(kind(net, sgd, **options), pair)


def _steps(schedule: sedona_fx.train.Schedule, pair: Pair) -> Step:
    def step() -> None:
        schedule.step(*pair)
        wait(pair[0].device)

    return step


def _reset_peak(device: torch.device) -> int:
    """Let the allocator's peak begin anew; return what is allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
