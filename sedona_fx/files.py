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


def read_torch_file(path: str | Path, what: str, *, advice: str = "", keep_devices: bool = False) -> Any:
    """Read a file that ``torch.save`` wrote, without running code that it may contain.

    Args:
        path: the file.
        what: what it holds, for the error's text: ``"weights"``, ``"checkpoint"``.
        advice: what to do if it cannot be read, for the error's text.
        keep_devices: load tensors to the devices that they were saved from, instead of to the CPU.

    Returns:
        What was saved.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return torch.load(path, map_location=None if keep_devices else "cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the {what} {str(path)!r}: {load_failure(error)}.{advice}") from error


def load_failure(error: BaseException | None) -> str:
    """Return why ``torch.load`` failed, as one line.

    PyTorch adds a page of advice to load with ``weights_only=False``, which would run whatever code a damaged or
    foreign file contains; it is left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0] if lines else "")
    return f"{type(error).__name__}: {reason.split('Please use')[0].strip()}".rstrip(".")
