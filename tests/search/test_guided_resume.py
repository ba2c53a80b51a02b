"""A guided search or a rollout that was killed, by SIGKILL and at any moment, ends bit for bit as one that was not."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import killable
import numpy as np
import pytest
import torch
from captured import Capture

from sedona_fx.errors import CheckpointError
from sedona_fx.search import Problem
from sedona_fx.search.session.journal import Journal
from sedona_fx.search.trials.plan_tree import PlanTree

BOTH = pytest.mark.parametrize("name", ["guided", "rollout"])


@pytest.fixture(scope="module")
def problem() -> Problem:
    capture = Capture()
    killable.plan(capture)
    return capture.problem


class Killed(BaseException):
    pass


SMALL: dict[str, dict[str, Any]] = {
    "guided": {"training_steps": 80, "finalists": 2, "batch_size": 6},
    "rollout": {"steps": 5, "warmup_steps": 4, "plans": 5},
}


def small(name: str, folder: Path | None) -> Any:
    return replace(killable.SEARCHES[name](None if folder is None else str(folder)), **SMALL[name])


def stopped(search: Any, problem: Problem, write: int) -> bool:
    """Leave a search as a kill right before a write (as good as any time since the last one) would."""
    original, count = Journal.write, 0

    def killing(self: Journal, state: Any) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise Killed
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "write", killing)
        with contextlib.suppress(Killed):
            search.decide(problem)
            return False
    return True


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs POSIX processes")
@BOTH
def test_sigkill_at_any_moment(name: str, tmp_path: Path) -> None:
    command = [sys.executable, killable.__file__, name, str(tmp_path / "run"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["stood"]) >= 3, found["stood"]
    assert len(set(found["stood"])) > 1, found["stood"]
    undisturbed = killable.plan(killable.SEARCHES[name](None))
    assert found["plan"] == undisturbed.to_json()
    assert not undisturbed.provenance["interrupted"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["search.pt"]  # and no leftovers


@BOTH
def test_stopped_at_each_write(name: str, problem: Problem, tmp_path: Path) -> None:
    whole = small(name, None).decide(problem)
    assert [len(found["scores"]) for found in whole.provenance["rounds"]] in ([2, 1, 1], [5, 3, 2])
    for write in itertools.count(1):
        here = small(name, tmp_path / str(write))
        if not stopped(here, problem, write):
            break
        torch.manual_seed(write)
        random.seed(write)
        np.random.seed(write)
        assert here.decide(problem) == whole, write
    assert write > 9


@BOTH
def test_stopped_again_and_again(name: str, problem: Problem, tmp_path: Path) -> None:
    here, draw, stops = small(name, tmp_path), random.Random(0), 0
    while stopped(here, problem, draw.randrange(1, 5)):
        stops += 1
        assert stops < 200
    assert stops > 3
    assert here.decide(problem) == small(name, None).decide(problem)


@BOTH
def test_a_finished_search_is_returned_at_once(
    name: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = small(name, tmp_path)
    first = search.decide(problem)
    monkeypatch.setattr("sedona_fx.search.trials.supernet.Supernet.train", None)
    monkeypatch.setattr("sedona_fx.search.trials.plan_tree.PlanTree.train", None)
    assert replace(search, save_seconds=1.0).decide(problem) == first  # that does not make it another search


@BOTH
def test_a_folder_of_another_search_is_refused_with_what_differs(name: str, problem: Problem, tmp_path: Path) -> None:
    search = small(name, tmp_path)
    assert stopped(search, problem, 5)
    with pytest.raises(CheckpointError, match=r"another search: settings\.lr was 0\.05 there and is 0\.1 here"):
        replace(search, lr=0.1).decide(problem)
    with pytest.raises(CheckpointError, match=r"seed was 0 there and is 1 here"):
        search.decide(replace(problem, seed=1))


@BOTH
def test_ctrl_c_leaves_a_folder_to_go_on_from(
    name: str, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = small(name, tmp_path)
    train, steps = PlanTree.train, 0

    def pressed(self: Any, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        train(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("sedona_fx.search.trials.plan_tree.PlanTree.train", pressed)
        assert search.decide(problem).provenance["interrupted"]
    assert search.decide(problem) == small(name, None).decide(problem)


def test_seconds_are_counted_once_whatever_the_clock_says_later(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = replace(killable.guided(str(tmp_path)), training_steps=None, seconds=3.0)
    monkeypatch.setattr("sedona_fx.search.trials.effort.seconds_of", lambda run, device: 0.1)
    whole = replace(search, folder=None).decide(problem)
    assert stopped(search, problem, 8)
    monkeypatch.setattr("sedona_fx.search.trials.effort.seconds_of", lambda run, device: 0.4)
    other = replace(search, folder=None).decide(problem)
    again = search.decide(problem)
    assert again == whole
    assert again.provenance["cost"]["warmup_steps"] > other.provenance["cost"]["warmup_steps"]
    assert again.provenance["cost"]["seconds"] == 3.0
