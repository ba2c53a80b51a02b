"""Two searches in one folder: the second is refused by name, and a killed one leaves the folder free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sedona_fx.search.session.lock as lock_module
from sedona_fx.errors import CheckpointError
from sedona_fx.search.session.journal import Journal
from sedona_fx.search.session.lock import LOCK_FILE, FolderLock

HOLDER = """
import sys, time
from sedona_fx.search.session.journal import Journal
journal = Journal(sys.argv[1], {}, 0.0)
journal.write({"x": 1})
print("written", flush=True)
time.sleep(60)
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_search_is_refused_while_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, refused = torch.save, []

    def saving(*args: Any, **options: Any) -> None:
        save(*args, **options)
        other = Journal(tmp_path, {}, 0.0)
        for call in (other.read, lambda: other.write({"x": 3})):
            with pytest.raises(CheckpointError, match=r"another search is using the folder .*\(process \d+ on .*Wait"):
                call()
            refused.append(call)

    first = Journal(tmp_path, {}, 0.0)
    with first:
        first.write({"x": 1})
        monkeypatch.setattr(torch, "save", saving)
        first.write({"x": 2})
        monkeypatch.undo()
        assert len(refused) == 2
    assert names(tmp_path) == ["search.pt"]
    with Journal(tmp_path, {}, 0.0) as second:
        assert second.read() == {"x": 2}
        assert names(tmp_path) == [LOCK_FILE, "search.pt"]
    assert names(tmp_path) == ["search.pt"]


def test_a_search_that_failed_leaves_the_folder_free(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {}, 0.0)
    with pytest.raises(TypeError), journal:
        journal.write(1)  # type: ignore[arg-type]
    again = Journal(tmp_path, {}, 0.0)
    again.write({"x": 1})
    del again  # without having been a context manager
    assert FolderLock(tmp_path)


@posix
def test_a_killed_search_leaves_the_folder_free(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "written"
        with pytest.raises(CheckpointError, match=rf"process {holder.pid} on"):
            Journal(tmp_path, {}, 0.0).read()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert names(tmp_path) == [LOCK_FILE, "search.pt"]
    with Journal(tmp_path, {}, 0.0) as journal:
        assert journal.read() == {"x": 1}
    assert names(tmp_path) == ["search.pt"]


@posix
def test_a_worker_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)  # until the parent is done
        os._exit(0)
    lock.release()
    FolderLock(tmp_path).release()
    os.write(writer, b"x")
    os.waitpid(child, 0)
    assert names(tmp_path) == []


def test_without_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "try_lock", lambda descriptor: None)
    with pytest.warns(UserWarning, match=r"has no locks: let no other search use this folder"):
        lock = FolderLock(tmp_path)
    lock.release()
