"""States of the relaxed net to search at: in memory as far as a byte budget goes, on disk beyond it.

Each change of a snapshot on disk is a file of its own, and the one before stays until :meth:`SnapshotStore.commit`. So
whatever the journal refers to exists at every moment, and a kill between two writes loses nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sedona_fx.search.relaxed.state import State
from sedona_fx.search.session.journal import load, save

_PREFIX = "search-snapshot-"

Reference = list[Any]
"""A snapshot as a journal names it: its index, the version of its file, its learning rate and its bytes."""


@dataclass
class _Held:
    lr: float
    state_bytes: int
    resident: bool  # stays in memory when it is put
    state: State | None  # None: on disk, or taken
    version: int  # of the newest file; 0: there is none
    written: bool  # the newest file holds what was put last


class SnapshotStore:
    """Snapshots by index. Those put first stay in memory until `limit` bytes are full; the others live on disk.

    A context manager: without `folder`, what is on disk is in a temporary directory that is removed at the end.

    Args:
        limit: bytes of snapshots to keep in memory (where their tensors are: on the net's device). None: all.
        folder: for those on disk, and for :meth:`flush`.
    """

    def __init__(self, limit: int | None, folder: Path | None) -> None:
        self._limit, self._folder, self._kept = limit, folder, set[Path]()
        self._held: dict[int, _Held] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def state_bytes(self) -> int:
        """Bytes of all snapshots, wherever they are."""
        return sum(held.state_bytes for held in self._held.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of those that are kept in memory."""
        return sum(held.state_bytes for held in self._held.values() if held.resident)

    def put(self, index: int, state: State, lr: float) -> None:
        """Keep a state under an index, or put back one that was taken. The store owns it from here on."""
        held = self._held.get(index)
        if held is None:
            size = state.state_bytes
            self._held[index] = held = _Held(lr, size, self._fits(size), None, 0, False)
        held.lr, held.state, held.written = lr, state, False
        if not held.resident:
            self._write(index, held)
            held.state = None

    def take(self, index: int) -> tuple[State, float]:
        """Return a state and its learning rate, to be changed and put back."""
        held = self._held[index]
        if held.state is None:
            return State(**load(self._path(index, held.version))), held.lr
        state, held.state = held.state, None
        return state, held.lr

    def flush(self) -> list[Reference]:
        """Write what the folder does not hold yet; return what a journal has to say about the snapshots."""
        for index, held in self._held.items():
            if not held.written:
                self._write(index, held)
        return [[k, held.version, held.lr, held.state_bytes] for k, held in self._held.items()]

    def commit(self) -> None:
        """Keep the files that :meth:`flush` named last, and remove the other ones."""
        self._kept = {self._path(k, held.version) for k, held in self._held.items() if held.version}
        if self._folder is not None:
            for path in self._folder.glob(f"{_PREFIX}[0-9]*-[0-9]*.pt"):  # the user's own files stay
                if path not in self._kept:
                    path.unlink(missing_ok=True)

    def restore(self, references: Sequence[Reference]) -> None:
        """Go back to what :meth:`flush` returned."""
        self._held = {}
        for index, version, lr, size in references:
            resident = self._fits(size)
            state = State(**load(self._path(index, version))) if resident else None
            self._held[index] = _Held(lr, size, resident, state, version, True)
        self.commit()

    @property
    def indices(self) -> list[int]:
        """Of the snapshots that there are."""
        return list(self._held)

    def keep(self, index: int) -> None:
        """Forget all snapshots but one; their files go with the next :meth:`commit`."""
        self._held = {index: self._held[index]}

    def clear(self) -> None:
        """Forget all snapshots; their files go with the next :meth:`commit`."""
        self._held = {}

    def _fits(self, size: int) -> bool:
        return self._limit is None or self.resident_bytes + size <= self._limit

    def _write(self, index: int, held: _Held) -> None:
        assert held.state is not None
        old = self._path(index, held.version)
        held.version += 1
        save(self._path(index, held.version), held.state.fields())
        held.written = True
        if old not in self._kept:
            old.unlink(missing_ok=True)

    def _path(self, index: int, version: int) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sedona_fx-snapshots-")
            self._folder = Path(self._temporary.name)
        return self._folder / f"{_PREFIX}{index:03d}-{version}.pt"
