"""A search that was killed, by SIGKILL and at any moment, ends bit for bit as one that never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import killable
import pytest
import torch
from tiny_search import SMALL, WORK, batches, loss, make_blocks, same, search

import sedona_fx
from sedona_fx.errors import CheckpointError
from sedona_fx.search import Sedona
from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.result import SedonaResult

SCRIPT = Path(killable.__file__)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs POSIX processes")
@pytest.mark.parametrize(("unroll", "disk"), [(1, "some on disk"), (2, "all on disk")])
def test_sigkill_at_any_moment(unroll: int, disk: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"sedona, {disk}", str(tmp_path / "run"), "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["stood"]) >= 3, found["stood"]
    assert len(set(found["stood"])) > 1, found["stood"]
    undisturbed = killable.plan(killable.settings(None, unroll, 2**30))
    resumed = sedona_fx.Plan.from_json(found["plan"])
    assert resumed == sedona_fx.Plan.from_json(undisturbed.to_json())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["search.pt"]  # and no leftovers


class Killed(BaseException):
    pass


def stopped(settings: Sedona, step: int) -> None:
    """Run a search and leave it as a kill would in the middle of a step."""
    train, count = BilevelSearch._train, 0

    def killing(self: BilevelSearch, *args: Any) -> None:
        nonlocal count
        if count == step:
            raise Killed
        count += 1
        train(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_train", killing)
        with pytest.raises(Killed):
            search(settings)


@pytest.mark.parametrize("snapshot_bytes", [0, None])
@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_stopped_at_each_step(snapshot_bytes: int | None, save_seconds: float, tmp_path: Path) -> None:
    settings = replace(SMALL, snapshot_bytes=snapshot_bytes, save_seconds=save_seconds)
    whole = search(settings)
    for step in range(6 + 5):
        here = replace(settings, folder=tmp_path / str(step))
        stopped(here, step)
        torch.manual_seed(step)
        again = search(here)
        assert same(whole, again)
        assert whole.cost == again.cost
        assert torch.equal(whole.farthest, again.farthest)
        assert not again.interrupted


def test_failures_are_remembered(tmp_path: Path) -> None:
    """A snapshot that was bad before the kill is bad behind it."""

    def at(folder: Path | None, step: int | None) -> SedonaResult | None:
        now = 0

        def event(handed: int) -> None:
            nonlocal now
            now = handed

        def faulty(block: int, output: Any, target: Any) -> Any:
            return loss(block, output, target) * (float("nan") if now == bad else 1.0)

        settings = replace(SMALL, folder=folder, save_seconds=0.0)
        data = batches(event=event)
        if step is None:
            return search(settings, train=data, local_loss=faulty)
        with pytest.MonkeyPatch.context() as patch:
            meta, count = BilevelSearch._meta_iteration, 0

            def killing(self: BilevelSearch, index: int) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    raise Killed
                return meta(self, index)

            patch.setattr(BilevelSearch, "_meta_iteration", killing)
            with pytest.raises(Killed):
                search(settings, train=data, local_loss=faulty)
        return None

    bad = 6 + 1
    whole = at(None, None)
    assert at(tmp_path, 4) is None
    bad = -1
    again = at(tmp_path, None)
    assert whole is not None
    assert again is not None
    assert same(whole, again)
    assert whole.failures == again.failures != []


def test_a_finished_search_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, folder=tmp_path)
    first = search(settings)
    monkeypatch.setattr(BilevelSearch, "_train", None)
    again = search(replace(settings, save_seconds=1.0, snapshot_bytes=0))  # these do not make another search
    assert same(first, again)
    assert first.cost == again.cost


def test_ctrl_c_leaves_a_folder_to_go_on_from(tmp_path: Path) -> None:
    def event(n: int) -> None:
        if n == 12:
            raise KeyboardInterrupt

    settings = replace(SMALL, folder=tmp_path, save_seconds=0.0)
    assert search(settings, train=batches(event=event)).interrupted
    whole = search(settings)
    assert not whole.interrupted
    assert same(whole, search())


def test_a_folder_of_another_search_is_refused_with_what_differs(tmp_path: Path) -> None:
    settings = replace(SMALL, folder=tmp_path, save_seconds=0.0)
    stopped(settings, 8)
    with pytest.raises(CheckpointError, match=r"another search: seed was 0 there and is 1 here\. Hand another folder="):
        search(settings, seed=1)
    with pytest.raises(
        CheckpointError, match=r"settings\.lr was 0\.05 there and is 0\.1 here; settings\.meta_betas was"
    ):
        search(replace(settings, lr=0.1, meta_betas=(0.9, 0.999)))
    blocks = make_blocks()
    blocks[1].module.fc = torch.nn.Linear(6, 6, bias=False)
    with pytest.raises(CheckpointError, match=r"shapes\.1\.fc\.bias is only there"):
        search(settings, blocks=blocks)
    with pytest.raises(CheckpointError, match="places is only here"):
        settings.run(
            make_blocks(),
            loss,
            train_batches=batches(),
            val_batches=batches(),
            work=WORK,
            seed=0,
            progress=False,
            names={"places": ["a"]},
        )
    assert same(search(settings), search())


def test_through_decouple_names_and_candidates_are_compared_and_any_number_of_blocks_is_served(tmp_path: Path) -> None:
    settings = replace(killable.settings(str(tmp_path), 1, 0), warmup_steps=2, meta_steps=2, snapshots=1)
    first = killable.plan(settings)
    assert killable.plan(settings) == first
    with pytest.raises(CheckpointError, match=r"seed was 0 there and is 1 here"):
        killable.plan(settings, seed=1)
    with pytest.raises(CheckpointError, match=r"shapes\.0\..*was '\(.*\) float32' there"):
        killable.plan(settings, width=7)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    settings = replace(SMALL, folder=tmp_path)
    (tmp_path / "search.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"cannot read .*search\.pt.* Delete the folder"):
        search(settings)
