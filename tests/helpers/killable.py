"""A search in processes that are killed: ``python killable.py SEARCH FOLDER KILLS`` prints its plan.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import sedona_fx
from sedona_fx.search import Guided, Rollout, Sedona


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


def plan(search: Any, seed: int = 0, width: int = 6) -> sedona_fx.Plan:
    """Search, on a loader whose order comes from a generator of its own."""
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(Noisy(1), batch_size=6, shuffle=True, generator=generator)
    val_data = DataLoader(Noisy(2), batch_size=10, shuffle=True)
    torch.manual_seed(int.from_bytes(random.randbytes(4), "little"))  # the user's streams do not matter
    net = model()
    if width != 6:
        net[0] = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6))
    return sedona_fx.decouple(
        net, data, val_data=val_data, blocks=3, heads=["tokens-1", "tokens-2"], search=search, seed=seed, progress=False
    ).plan


def settings(folder: str | None, unroll: int, snapshot_bytes: int, **more: Any) -> Sedona:
    """A search that writes down where it stands behind each step."""
    steps: dict[str, Any] = {} if "seconds" in more else {"warmup_steps": 12, "meta_steps": 16}
    return Sedona(
        **steps, snapshots=4, unroll=unroll, snapshot_bytes=snapshot_bytes, folder=folder, save_seconds=0.0, **more
    )


def guided(folder: str | None) -> Guided:
    """Some 15 steps of its first part and 14 of its rollouts."""
    return Guided(
        training_steps=190, states=2, finalists=4, batch_size=3, val_batches=1, folder=folder, save_seconds=0.0
    )


def rollout(folder: str | None) -> Rollout:
    """Rollouts of all plans but a few, behind a warm-up."""
    return Rollout(steps=14, warmup_steps=12, plans=8, val_batches=1, folder=folder, save_seconds=0.0)


SEARCHES: dict[str, Callable[[str | None], Any]] = {
    "sedona, some on disk": lambda folder: settings(folder, 1, 15_000),
    "sedona, all on disk": lambda folder: settings(folder, 2, 0),
    "guided": guided,
    "rollout": rollout,
}


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


def stands(folder: Path) -> str:
    """Return where the search in a folder stands."""
    path = folder / "search.pt"
    if not path.exists():
        return "no save yet"
    state = torch.load(path, weights_only=True)["state"]
    if "counts" in state:
        return str(state["counts"]["where"])
    steps = {name: part["step"] for name, part in state.items() if isinstance(part, dict) and "step" in part}
    return str(steps) if steps else "finished"


def killed(search: Any, draw: random.Random, kills: int) -> list[str]:
    """Start the search again and again and kill it, in turn at a write and at any time; return where it stood then."""
    stood = []
    for turn in range(kills):
        child = os.fork()
        if child == 0:
            if turn % 2 == 0:
                die_at_write(draw.randrange(1, 12), before=draw.random() < 0.5)
            plan(search)
            os._exit(0)
        if turn % 2 == 1:
            time.sleep(draw.uniform(0.2, 1.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        draw.random()
        if os.WIFSIGNALED(status):
            stood.append(stands(Path(str(search.folder))))
    return stood


if __name__ == "__main__":
    torch.set_num_threads(1)
    search = SEARCHES[sys.argv[1]](sys.argv[2])
    stood = killed(search, random.Random(sys.argv[1]), int(sys.argv[3]))
    print(json.dumps({"stood": stood, "plan": plan(search).to_json()}))  # noqa: T201
