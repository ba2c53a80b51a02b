"""The files of a search that somebody edited, or that are damaged: a typed error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_guided_resume import Killed, problem, small, stopped  # noqa: F401
from tiny_search import SMALL, search

from sedona_fx.errors import CheckpointError
from sedona_fx.search import Problem
from sedona_fx.search.sedona.bilevel import BilevelSearch

MATCH = r"damaged|no place in its data|cannot read|no snapshot of this search"


def edit(path: Path, where: tuple[Any, ...], value: Any) -> None:
    content = torch.load(path, weights_only=True)
    *parents, last = where
    state = content
    for key in parents:
        state = state[key]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value(state[last]) if callable(value) else value
    torch.save(content, path)


ABSURD = [-1, 10**30, 1.5, "3", None]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("state",), KeyError),
        (("identity",), 3),
        *[(("state", "comparison", "step"), value) for value in ABSURD],
        (("state", "comparison", "spent"), float("nan")),
        (("state", "comparison", "optimizer", "state"), {99: {}}),
        (("state", "comparison", "optimizer", "state", 0, "momentum_buffer"), lambda t: t[:1]),
        (("state", "comparison", "net", "modules"), {}),
        (("state", "shares"), [[1]]),
        (("state", "train"), [-1, 0]),
        (("state", "train"), [0, 1.5]),
        (("state", "train"), KeyError),
    ],
)
def test_guided(problem: Problem, tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:  # noqa: F811
    here = small("guided", tmp_path)
    assert stopped(here, problem, 8)
    edit(tmp_path / "search.pt", where, value)
    with pytest.raises(CheckpointError, match=MATCH):
        here.decide(problem)


def left(folder: Path) -> Any:
    settings = replace(SMALL, folder=folder, save_seconds=0.0, snapshot_bytes=0)
    train, count = BilevelSearch._train, 0

    def killing(self: BilevelSearch, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise Killed
        train(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_train", killing)
        with pytest.raises(Killed):
            search(settings)
    return settings


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("state", "counts"), {}),
        (("state", "train"), [0, -3]),
        (("state", "random"), [1]),
        (("state", "draws"), torch.zeros(3)),
        (("state", "budget"), {"a": 1}),
        (("state", "snapshots", 0, 1), -1),
        (("state", "snapshots", 0, 2), float("nan")),
        (("state", "snapshots", 0, 1), 99),
        (("state", "snapshots"), KeyError),
    ],
)
def test_sedona(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    settings = left(tmp_path)
    edit(tmp_path / "search.pt", where, value)
    with pytest.raises(CheckpointError, match=MATCH):
        search(settings)


def test_snapshots(tmp_path: Path) -> None:
    settings = left(tmp_path)
    path = min(tmp_path.glob("search-snapshot-*.pt"))
    good = path.read_bytes()
    tensor = torch.load(path, weights_only=True)["params"][0]["fc.weight"]
    place = good.find(tensor.numpy().tobytes()) + 3
    path.write_bytes(good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :])
    with pytest.raises(CheckpointError, match=r"cannot read a snapshot of the search, .*damaged: its part 'data/"):
        search(settings)
    path.write_bytes(good)
    for snapshot in tmp_path.glob("search-snapshot-*.pt"):
        edit(snapshot, ("params", 0, "fc.weight"), lambda t: t[:2])
    with pytest.raises(CheckpointError, match=r"is no snapshot of this search: its weights, buffers or momenta"):
        search(settings)
