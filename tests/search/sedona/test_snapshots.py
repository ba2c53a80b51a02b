"""Snapshots are the same in memory and on disk, and what was written last is there at every moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_search import SMALL, make_blocks, same, search

from sedona_fx.errors import CheckpointError
from sedona_fx.search.relaxed.state import State
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.session import journal


def state(value: float) -> State:
    found = State.of(make_blocks())
    for tensors in (*found.params, *found.momentum):
        for t in tensors.values():
            t.fill_(value)
    return found


def value_of(found: State) -> float:
    values = {float(v) for d in (*found.params, *found.momentum) for t in d.values() for v in t.unique()}
    assert len(values) == 1
    return values.pop()


SIZE = state(0.0).state_bytes


@pytest.mark.parametrize(("limit", "resident"), [(None, 3), (3 * SIZE, 3), (2 * SIZE, 2), (SIZE - 1, 0), (0, 0)])
def test_the_byte_budget_holds_and_snapshots_come_back_as_they_were_put(limit: int | None, resident: int) -> None:
    with SnapshotStore(limit, None) as store:
        for k in range(3):
            store.put(k, state(float(k)), 0.1 * k)
        for _ in range(2):
            assert store.resident_bytes == resident * SIZE
            assert store.state_bytes == 3 * SIZE
            for k in (2, 0, 1):
                found, lr = store.take(k)
                assert lr == 0.1 * k
                store.put(k, state(value_of(found) + 1.0), lr)
        assert [value_of(store.take(k)[0]) for k in range(3)] == [2.0, 3.0, 4.0]
        folder = store._folder
        assert (folder is None) == (resident == 3)
        assert folder is None or len(list(folder.iterdir())) == 3 - resident
    assert folder is None or not folder.exists()


@pytest.mark.parametrize("limit", [None, SIZE, 0])
def test_what_was_committed_stays_until_the_next_commit(limit: int | None, tmp_path: Path) -> None:
    store = SnapshotStore(limit, tmp_path)
    for k in range(3):
        store.put(k, state(float(k)), 0.5)
    references = store.flush()
    store.commit()
    for turn in range(2):  # changes that no journal has heard of, some of them written
        store.put(1, state(10.0 + turn), 0.5)
    store.flush()
    again = SnapshotStore(limit, tmp_path)
    again.restore(references)
    assert [value_of(again.take(k)[0]) for k in range(3)] == [0.0, 1.0, 2.0]
    assert len(list(tmp_path.iterdir())) == 3
    for k in range(3):
        again.put(k, state(20.0 + k), 0.25)
    last = again.flush()
    again.commit()
    third = SnapshotStore(limit, tmp_path)
    third.restore(last)
    assert [(value_of(s), lr) for s, lr in map(third.take, range(3))] == [(20.0, 0.25), (21.0, 0.25), (22.0, 0.25)]
    third.clear()
    third.commit()
    assert not list(tmp_path.iterdir())


def test_a_search_is_the_same_wherever_its_snapshots_are(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    load = journal.load
    monkeypatch.setattr("sedona_fx.search.sedona.snapshots.load", lambda path: loaded.append(path) or load(path))
    settings = replace(SMALL, meta_steps=8)
    in_memory = search(replace(settings, snapshot_bytes=None))
    assert not loaded
    assert same(in_memory, search(replace(settings, snapshot_bytes=2 * SIZE)))
    few = len(loaded)
    assert same(in_memory, search(replace(settings, snapshot_bytes=0)))
    assert 0 < few < len(loaded) - few == 8


def test_files_of_the_users_own_stay(tmp_path: Path) -> None:
    (tmp_path / "snapshot-best.pt").write_bytes(b"a year of training")
    store = SnapshotStore(None, tmp_path)
    store.put(0, state(0.0), 0.5)
    store.flush()
    store.commit()
    store.clear()
    store.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-best.pt"]


def test_files_hold_plain_tensors(tmp_path: Path) -> None:
    store = SnapshotStore(0, tmp_path)
    store.put(0, state(3.0), 0.5)
    (path,) = tmp_path.iterdir()
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"params", "buffers", "momentum", "borrowed", "late"}


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes' is a file: hand a folder="):
        journal.Journal(tmp_path / "notes", {}, 0.0).read()
