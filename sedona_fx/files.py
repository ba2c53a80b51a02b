"""Atomic replacement of files: no reader sees half of a file, and after a crash the old file is still there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sedona_fx.errors import CheckpointError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` if the body does not raise.

    The temporary file is in the folder of `path`, which is made if it does not exist, and has the same suffix.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # else the new file would keep mkstemp's 0600
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_torch_file(path: str | Path, what: str) -> Any:
    """Read a file that ``torch.save`` wrote: tensors on the CPU, plain values, no code.

    Args:
        path: of the file.
        what: it should hold, for the message: ``"weights"``.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes the unpickler raise
        raise CheckpointError(f"cannot read the {what} {str(path)!r}: {type(error).__name__}: {error}.") from error
