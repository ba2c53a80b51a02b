"""The lock on the folder of a search: one search at a time writes to it, and a killed one leaves it free."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
import weakref
from pathlib import Path

from sedona_fx.errors import CheckpointError
from sedona_fx.files import try_lock

LOCK_FILE = "search.lock"
_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """A lock of the operating system on a file in a folder, which ends with the process whatever ends it.

    The file names the process that holds it, and is removed with the lock; what a killed process left of it is taken
    over. Where the file system has no locks, a warning says that two searches are not told apart.

    Args:
        folder: the folder, made if it does not exist.

    Raises:
        CheckpointError: another search holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._descriptor = folder / LOCK_FILE, -1
        while self._descriptor < 0:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = try_lock(descriptor)
            if locked is False:
                owner = os.read(descriptor, 200).decode(errors="replace").strip() if os.name != "nt" else ""
                os.close(descriptor)
                raise CheckpointError(
                    f"another search is using the folder {str(folder)!r}{owner and f' ({owner})'}. Wait until it has "
                    "ended, or hand another folder=."
                )
            if locked is None:
                text = f"the file system of {str(folder)!r} has no locks: let no other search use this folder."
                warnings.warn(text, UserWarning, stacklevel=2)
            if self._is_there(descriptor):
                self._descriptor = descriptor
            else:  # its last owner has just removed it
                os.close(descriptor)
        with contextlib.suppress(OSError):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _HELD.add(self)

    def release(self) -> None:
        """Remove the file and end the lock; nothing happens the second time."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._is_there(self._descriptor):
                    self._path.unlink(missing_ok=True)
            self.forget()

    def forget(self) -> None:
        """Close the file alone: in a forked process, which does not hold the lock of its parent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()

    def _is_there(self, descriptor: int) -> bool:
        """Return whether the path still leads to the open file."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except OSError:
            return False


def _forget_all() -> None:
    for lock in list(_HELD):
        lock.forget()


if hasattr(os, "register_at_fork"):
    # Else a worker of a data loader would hold the lock for as long as it outlives a search that was killed.
    os.register_at_fork(after_in_child=_forget_all)
