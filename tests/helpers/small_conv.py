"""Small nets of stages in a chain for tests of searches, whose blocks a test can run by hand; and their problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from captured import captured
from torch import Tensor, nn

from sedona_fx.search import Problem

HEADS = ["linear", "sedona-1"]
Plan = tuple[tuple[int, int], ...]


def chain(stages: int = 4, drop: float = 0.0) -> nn.Sequential:
    """Convolutions with BatchNorm, and a linear layer on top; the last two modules are one stage."""
    torch.manual_seed(0)
    widths = [3, 6, 6, 8, 8, 8][: stages + 1]
    parts = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(drop))
        for a, b in itertools.pairwise(widths)
    ]
    top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))
    return nn.Sequential(*parts, top).double()


def stages_of(model: nn.Sequential) -> list[nn.Module]:
    """Return the stretches between a chain's places."""
    return [*model[:-2], nn.Sequential(model[-2], model[-1])]


def loader(count: int = 5, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(4, (size,), generator=g))
        for _ in range(count)
    ]


def problem_of(model: nn.Module, blocks: int = 3, data: Any = None, **more: Any) -> Problem:
    return captured(model, loader() if data is None else data, blocks=blocks, **{"heads": HEADS, "seed": 7, **more})


def named(batch: tuple[Any, Any], name: str = "input") -> tuple[dict[str, Any], Any]:
    return {name: batch[0]}, batch[1]


def every_plan(heads: Sequence[int], cuts: int) -> list[Plan]:
    """Return all plans: places in order, and a head at each."""
    return [
        tuple(zip(places, picked, strict=True))
        for places in itertools.combinations(range(len(heads)), cuts)
        for picked in itertools.product(*(range(heads[place]) for place in places))
    ]
