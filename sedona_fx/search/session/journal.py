"""A folder in which a search saves its state, so that a search that was killed can resume.

One file, replaced atomically, holds everything that is small. It names the versions of the larger files that belong to
it (:mod:`~sedona_fx.search.sedona.snapshots`). It also identifies the search: the folder of another search is refused.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sedona_fx.errors import CheckpointError
from sedona_fx.files import is_abandoned, read_torch_file, replacing, torch_save
from sedona_fx.search.session.lock import FolderLock

STATE_FILE = "search.pt"
FORMAT = 1
_DIFFERENCES_SHOWN = 3
_WITHOUT_INFLUENCE = ("folder", "save_seconds", "snapshot_bytes")


class Journal:
    """The saved state of a search, for one search at a time: the folder is locked from the first call on.

    A context manager, which frees the folder at the end of the search; a killed process frees it as well.

    Args:
        folder: where it is saved; made at the first save. None: nothing is saved.
        identity: what the search's result depends on, as JSON: settings, seed, names, shapes.
        save_seconds: how long :meth:`due` waits after a save.
    """

    def __init__(self, folder: str | Path | None, identity: Mapping[str, Any], save_seconds: float) -> None:
        self.folder = None if folder is None else Path(folder)
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._save_seconds, self._saved_at = save_seconds, time.monotonic()
        self._lock: FolderLock | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> dict[str, Any] | None:
        """Return the state that was saved last, None if there is none. Files that a kill left half written are removed.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another search (the message lists what differs), or
                another search is using the folder.
        """
        if self.folder is None:
            return None
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{str(self.folder)!r} is a file: hand a folder= for the search to write to.")
        self._locked(self.folder)
        remove_leftovers(self.folder)
        path = self.folder / STATE_FILE
        if not path.exists():
            return None
        saved = load(path)
        if saved.get("format") != FORMAT:
            raise CheckpointError(f"{str(path)!r} is no search of this version of sedona_fx. Delete it to start anew.")
        if not isinstance(saved.get("identity"), dict) or not isinstance(saved.get("state"), dict):
            raise CheckpointError(f"{str(path)!r} is damaged. Delete the folder to start the search anew.")
        if different := list(_differences(saved["identity"], self._identity)):
            more = len(different) - _DIFFERENCES_SHOWN
            raise CheckpointError(
                f"the folder {str(self.folder)!r} holds another search: {'; '.join(different[:_DIFFERENCES_SHOWN])}"
                + (f"; and {more} more" if more > 0 else "")
                + ". Hand another folder=, or delete this one to start anew."
            )
        state: dict[str, Any] = saved["state"]
        return state

    def due(self) -> bool:
        """Whether it is time for the next save."""
        return self.folder is not None and time.monotonic() - self._saved_at >= self._save_seconds

    def write(self, state: Mapping[str, Any]) -> None:
        """Save a state of plain numbers, texts, containers and tensors; it replaces the last one atomically.

        Raises:
            CheckpointError: another search is using the folder.
        """
        if self.folder is not None:
            self._locked(self.folder)
            save(self.folder / STATE_FILE, {"format": FORMAT, "identity": self._identity, "state": dict(state)})
        self._saved_at = time.monotonic()

    def _locked(self, folder: Path) -> None:
        if self._lock is None:
            self._lock = FolderLock(folder)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Surround the code that takes over a state which :meth:`read` returned.

        Raises:
            CheckpointError: the state is not complete, or has values or shapes that this search cannot have.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise CheckpointError(
                f"the state of a search in {str(self.folder)!r} is damaged: {type(error).__name__}: {reason}. Delete "
                "the folder to start the search anew."
            ) from error


def settings_of(search: Any) -> dict[str, Any]:
    """Return the settings of a search (a dataclass) by name, without those that do not affect what it decides."""
    return {f.name: getattr(search, f.name) for f in fields(search) if f.name not in _WITHOUT_INFLUENCE}


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of plain values and tensors atomically."""
    with replacing(path) as temporary:
        torch_save(dict(content), temporary)


def load(path: Path) -> dict[str, Any]:
    """Read a file that :func:`save` wrote; tensors return to the devices they were on.

    Raises:
        CheckpointError: the file cannot be read.
    """
    advice = " It is damaged, or no file of a search. Delete the folder to start the search anew."
    content = read_torch_file(path, "state of a search", advice=advice, keep_devices=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} is damaged. Delete the folder to start the search anew.")
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writer was killed before it renamed them."""
    for path in folder.glob(".*.pt.*.pt"):
        if is_abandoned(path):
            path.unlink(missing_ok=True)


def _differences(saved: Any, present: Any, where: str = "") -> Iterator[str]:
    """Yield a text for each entry in which two identities differ."""
    if isinstance(saved, dict) and isinstance(present, dict):
        for key in dict.fromkeys((*present, *saved)):
            path = f"{where}.{key}" if where else key
            if key not in saved or key not in present:
                yield f"{path} is only {'here' if key in present else 'there'}"
            else:
                yield from _differences(saved[key], present[key], path)
    elif saved != present:
        yield f"{where} was {reprlib.repr(saved)} there and is {reprlib.repr(present)} here"
