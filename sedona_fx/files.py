"""Files: replaced whole, so that no reader sees half of one, and read only if every byte is what was written.

What ``torch.save`` writes is a zip archive with a CRC-32 of each of its parts, which ``torch.load`` does not look at:
:func:`read_torch_file` does. These do not cover the archive's directory (one bit there makes a part a folder, and its
tensor random memory), so :func:`torch_save` adds a CRC-32 of the whole file, as the archive's comment. JSON is parsed
with limits on depth and on the length of numbers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sedona_fx.errors import CheckpointError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

JSON_DEPTH = 100
"""How deep JSON may be nested; plans have about ten levels."""
_COMMENT = b"sedona_fx crc32 "
_ABANDONED_SECONDS = 24 * 3600.0
LARGEST_COUNT = 2**53
"""Counters of steps, epochs and batches in files are below this number."""


def is_count(value: Any) -> bool:
    """Return whether a value from a file can be a counter: a whole number from 0 up to a bound that no run reaches."""
    return type(value) is int and 0 <= value < LARGEST_COUNT


# ---- replacing -----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` if the body does not raise.

    The temporary file is in the folder of `path`, which is made if it does not exist, and has the same suffix. Its
    writer holds a lock on it, by which :func:`remove_leftovers` knows those of writers that were killed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary, descriptor = _temporary_beside(target)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # else the new file would keep 0600
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files of :func:`replacing` for a path whose writers were killed; those in use stay."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(?=[a-z_]*[0-9_])[a-z0-9_]{{8}}{re.escape(target.suffix)}")
    with suppress(OSError):
        for path in [Path(entry) for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]:
            if is_abandoned(path):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Return whether nobody writes to a temporary file any more: its writer's lock ended with the process.

    Where there are no locks, it is one that was not written to for a day.
    """
    try:
        if sys.platform == "win32":
            return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        free = try_lock(descriptor)
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS if free is None else free
    except OSError:
        return False
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process, without waiting; the lock ends when the file is closed, or with the process.

    Returns:
        True; False if another process, or another opening of the file, holds the lock; None if the file system has no
        locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


def _temporary_beside(target: Path) -> tuple[Path, int | None]:
    """Return a new empty file in the folder of a path, and the descriptor that holds its lock, if there are locks."""
    while True:
        temporary = target.parent / f".{target.name}.{secrets.randbelow(10**8):08d}{target.suffix}"
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        if sys.platform == "win32":  # an open file could not be renamed there
            os.close(descriptor)
            return temporary, None
        if try_lock(descriptor) is not False:
            return temporary, descriptor
        os.close(descriptor)  # somebody who cleans up took it for abandoned before it was locked


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- files of torch.save -------------------------------------------------------------------------------------------


def torch_save(content: Any, path: Path) -> None:
    """Write a file with ``torch.save``, always with checksums, also if the user has turned them off for other files.

    ``torch.load`` reads it as any other.
    """
    chosen = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(chosen)
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, of which there is none yet
        file.write(struct.pack("<H", len(_COMMENT) + 8))
        file.flush()
        comment = _COMMENT + f"{_crc32(path, 0):08x}".encode()
        file.write(comment)


def _crc32(path: str | Path, without: int) -> int:
    """Return the CRC-32 of a file without as many bytes at its end."""
    left, crc = os.stat(path).st_size - without, 0
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def read_torch_file(path: str | Path, what: str, *, advice: str = "", keep_devices: bool = False) -> Any:
    """Read a file that ``torch.save`` wrote, without running code that it may contain.

    Every part of the file is compared with its checksum first.

    Args:
        path: the file.
        what: what it holds, for the error's text: ``"weights"``, ``"checkpoint"``.
        advice: what to do if it cannot be read, for the error's text.
        keep_devices: load tensors to the devices that they were saved from, instead of to the CPU.

    Returns:
        What was saved.

    Raises:
        CheckpointError: it cannot be read, or its bytes are not those that were written.
    """
    if damage := damage_of(path):
        raise CheckpointError(f"cannot read the {what} {str(path)!r}: {damage}.{advice}")
    try:
        return torch.load(path, map_location=None if keep_devices else "cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the {what} {str(path)!r}: {load_failure(error)}.{advice}") from error


def damage_of(path: str | Path) -> str:
    """Return what is wrong with the bytes of a file that ``torch.save`` wrote, or ``""`` if they are as written."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts, comment = archive.infolist(), archive.comment
            if comment.startswith(_COMMENT):
                whole = f"{_crc32(path, len(comment)):08x}".encode() == comment.removeprefix(_COMMENT)
                if whole:
                    return ""
            damaged = archive.testzip()  # to say where; and for files from before there was a comment
    except zipfile.BadZipFile as error:
        return f"it is damaged, or no file of torch.save ({str(error).rstrip('.')})"
    except OSError as error:
        return f"{type(error).__name__}: {error}".rstrip(".")
    except Exception as error:  # whatever a changed byte makes of sizes, flags and names
        return f"it is damaged ({type(error).__name__}: {error})"
    if damaged is not None:
        part = damaged.partition("/")[2]
        return f"it is damaged: its part {part!r} has another checksum than when it was written"
    odd = any(part.external_attr or part.flag_bits & ~0x0808 or part.compress_type for part in parts)
    if comment.startswith(_COMMENT) or odd or len({part.filename for part in parts}) < len(parts):
        return "it is damaged: its directory is not as it was written"
    return ""


def load_failure(error: BaseException | None) -> str:
    """Return why ``torch.load`` failed, as one line.

    PyTorch adds a page of advice to load with ``weights_only=False``, which would run whatever code a damaged or
    foreign file contains; it is left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0] if lines else "")
    return f"{type(error).__name__}: {reason.split('Please use')[0].strip()}".rstrip(".")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text of which nothing is known.

    Raises:
        ValueError: it is not JSON, names a key of an object twice, is nested deeper than :data:`JSON_DEPTH`, or has a
            whole number of thousands of digits.
    """

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
        return found

    try:
        value = json.loads(text, object_pairs_hook=without_twins)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels") from None
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels")


def json_digest(value: Any) -> str:
    """Return a checksum of a value of JSON: that of its text with sorted keys and without spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
