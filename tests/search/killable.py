"""A search in processes that are killed: ``python killable.py FOLDER UNROLL SNAPSHOT_BYTES KILLS`` prints its plan.

The model is cut by ``decouple``; it has dropout, and its data noise from all three global streams. Processes are forked
from one that has imported everything, so that kills cost little time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sedona_fx
from sedona_fx.search import Sedona


class Noisy(Dataset[Any]):
    """Examples with noise from all three global streams, as augmentation has it."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(20, 6, generator=g), torch.randint(3, (20,), generator=g)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, k: int) -> Any:
        return self.x[k] + random.random() + np.random.rand() + torch.rand(6), self.y[k]


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)) for _ in range(4)
    ]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def plan(search: Sedona, seed: int = 0, width: int = 6) -> sedona_fx.Plan:
    """Search, on a loader whose order comes from a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(Noisy(1), batch_size=6, shuffle=True, generator=generator)
    val_data = DataLoader(Noisy(2), batch_size=10, shuffle=True)
    torch.manual_seed(int.from_bytes(random.randbytes(4), "little"))  # the user's streams do not matter
    net = model()
    if width != 6:
        net[0] = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6))  # type: ignore[index]
    return sedona_fx.decouple(
        net, data, val_data=val_data, blocks=3, heads=["tokens-1", "tokens-2"], search=search, seed=seed, progress=False
    ).plan


def settings(folder: str | None, unroll: int, snapshot_bytes: int, **more: Any) -> Sedona:
    """A search that writes down where it stands behind each step."""
    steps: dict[str, Any] = {} if "seconds" in more else {"warmup_steps": 12, "meta_steps": 16}
    return Sedona(
        **steps, snapshots=4, unroll=unroll, snapshot_bytes=snapshot_bytes, folder=folder, save_seconds=0.0, **more
    )


def die_at_write(number: int, *, before: bool) -> None:
    """Let this process be killed right before, or right after, a file takes its place for the n-th time."""
    replace, count = os.replace, 0

    def killing(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing  # type: ignore[assignment]


def killed(search: Sedona, draw: random.Random, kills: int) -> list[str]:
    """Start the search again and again and kill it, in turn at a write and at any time; return where it stood then."""
    stood = []
    for turn in range(kills):
        child = os.fork()
        if child == 0:
            if turn % 2 == 0:
                die_at_write(draw.randrange(1, 30), before=draw.random() < 0.5)
            plan(search)
            os._exit(0)
        if turn % 2 == 1:
            time.sleep(draw.uniform(0.2, 1.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        draw.random()
        if os.WIFSIGNALED(status):
            path = Path(str(search.folder)) / "search.pt"
            state = torch.load(path, weights_only=True)["state"] if path.exists() else {}
            stood.append(state["counts"]["where"] if "counts" in state else "no save yet" if not state else "finished")
    return stood


if __name__ == "__main__":
    torch.set_num_threads(1)
    search = settings(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    stood = killed(search, random.Random(sys.argv[2]), int(sys.argv[4]))
    print(json.dumps({"stood": stood, "plan": plan(search).to_json()}))  # noqa: T201
