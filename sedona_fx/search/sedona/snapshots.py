"""Snapshots of the relaxed net: kept in memory up to a limit in bytes, and on disk beyond it.

A snapshot on disk is never overwritten: each change goes to a new file, and the file before it stays until
:meth:`SnapshotStore.commit`. So the files that the journal refers to exist at every moment, and a kill between two
writes loses nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from sedona_fx.errors import CheckpointError
from sedona_fx.files import damage_of, is_count
from sedona_fx.search.relaxed.state import State
from sedona_fx.search.session.journal import load, save

_PREFIX = "search-snapshot-"

Reference = list[Any]
"""A snapshot in the journal: its index, the version of its file, its learning rate and its bytes."""


class Snapshot(NamedTuple):
    """A state of the relaxed net, and the learning rate at which its training goes on."""

    state: State
    lr: float


@dataclass
class _Entry:
    lr: float
    state_bytes: int
    resident: bool  # it stays in memory; if not, it is on disk only
    state: State | None  # None: on disk, or taken
    version: int  # of the newest file; 0: there is none
    written: bool  # the newest file holds what was put last


class SnapshotStore:
    """Snapshots by index. Those put first stay in memory until `limit` bytes are reached; the others are on disk.

    A context manager: without `folder`, what is on disk lies in a temporary directory, which is removed on exit.

    Args:
        limit: bytes of snapshots to keep in memory (where their tensors are: on the net's device). None: all.
        folder: for the files, those of :meth:`flush` included. None: a temporary directory, made when it is needed.
    """

    def __init__(self, limit: int | None, folder: Path | None) -> None:
        self._limit, self._folder = limit, folder
        self._entries: dict[int, _Entry] = {}
        self._committed: set[Path] = set()
        self._like: State | None = None  # what a snapshot in a file has to look like
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def indices(self) -> list[int]:
        """Indices of all snapshots, in the order in which they were first put."""
        return list(self._entries)

    @property
    def state_bytes(self) -> int:
        """Bytes of all snapshots, in memory and on disk."""
        return sum(entry.state_bytes for entry in self._entries.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the snapshots that are kept in memory."""
        return sum(entry.state_bytes for entry in self._entries.values() if entry.resident)

    def put(self, index: int, state: State, lr: float) -> None:
        """Keep a state and its learning rate under an index, or put back what was taken. The store then owns them."""
        entry = self._entries.get(index)
        if entry is None:
            size = state.state_bytes
            entry = _Entry(lr, size, resident=self._fits(size), state=None, version=0, written=False)
            self._entries[index] = entry
        entry.lr, entry.state, entry.written = lr, state, False
        if not entry.resident:
            self._write(index, entry)
            entry.state = None

    def take(self, index: int) -> Snapshot:
        """Return a snapshot, to be changed and put back."""
        entry = self._entries[index]
        if entry.state is None:
            return Snapshot(self._load(self._path(index, entry.version)), entry.lr)
        state, entry.state = entry.state, None
        return Snapshot(state, entry.lr)

    def keep(self, index: int) -> None:
        """Forget all snapshots but one; their files go with the next :meth:`commit`."""
        self._entries = {index: self._entries[index]}

    def clear(self) -> None:
        """Forget all snapshots; their files go with the next :meth:`commit`."""
        self._entries = {}

    def flush(self) -> list[Reference]:
        """Write all snapshots that have changed since their last file, and return references for the journal."""
        for index, entry in self._entries.items():
            if not entry.written:
                self._write(index, entry)
        return [[index, entry.version, entry.lr, entry.state_bytes] for index, entry in self._entries.items()]

    def commit(self) -> None:
        """Keep the files that :meth:`flush` named last, and remove all others."""
        self._committed = {self._path(index, entry.version) for index, entry in self._entries.items() if entry.version}
        if self._folder is not None:
            for path in self._folder.glob(f"{_PREFIX}[0-9]*-[0-9]*.pt"):  # the user's own files stay
                if path not in self._committed:
                    path.unlink(missing_ok=True)

    def restore(self, references: Sequence[Reference], like: State | None = None) -> None:
        """Go back to the snapshots that :meth:`flush` returned references to.

        Args:
            references: from the journal.
            like: a state of the same net, with which names, shapes and dtypes are compared; None: they are not.

        Raises:
            CheckpointError: the file of a snapshot cannot be read, or it is of another net.
            ValueError: a reference is none.
        """
        self._entries, self._like = {}, like
        for index, version, lr, size in references:
            if not all(map(is_count, (index, version, size))) or not math.isfinite(lr):
                raise ValueError(f"a snapshot has the reference {[index, version, lr, size]}")
            resident = self._fits(size)
            path = self._path(index, version)
            if not resident and (damage := damage_of(path)):
                raise CheckpointError(f"cannot read a snapshot of the search, {str(path)!r}: {damage}.")
            state = self._load(path) if resident else None
            self._entries[index] = _Entry(lr, size, resident, state, version=version, written=True)
        self.commit()

    def _load(self, path: Path) -> State:
        try:
            state = State(**load(path))
            state.require_like(self._like)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{str(path)!r} is no snapshot of this search: {error}. Delete the folder."
            ) from error
        return state

    def _fits(self, size: int) -> bool:
        return self._limit is None or self.resident_bytes + size <= self._limit

    def _write(self, index: int, entry: _Entry) -> None:
        assert entry.state is not None
        previous = self._path(index, entry.version)
        entry.version += 1
        save(self._path(index, entry.version), entry.state.fields())
        entry.written = True
        if previous not in self._committed:
            previous.unlink(missing_ok=True)

    def _path(self, index: int, version: int) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sedona_fx-snapshots-")
            self._folder = Path(self._temporary.name)
        return self._folder / f"{_PREFIX}{index:03d}-{version}.pt"
