"""What lies between two workers: batches on the buffer's device, compressed if asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.sources import to_device
from sedona_fx.train.buffers.codec import Codec, encodable
from sedona_fx.train.buffers.ring import Ring

Entry = dict[str, Any]
"""A batch as it lies in the ring: containers, tensors and plain values."""


@dataclass(frozen=True)
class Stored:
    """A batch for the next block: what it and later ones read, the net's inputs where a loss looks at them, the target;
    and the entry of the ring it came from."""

    values: dict[str, Any]
    inputs: Mapping[str, Any]
    target: Any
    entry: Entry | None = None


class Buffer:
    """A ring of batches.

    Args:
        capacity: batches at most.
        max_uses: uses of a batch at most, or None.
        device: where the batches lie; None: where they are.
        codec: what activations are compressed by; each activation has a codec of its own.
        compressible: names of the activations.
    """

    def __init__(
        self,
        capacity: int,
        max_uses: int | None,
        device: torch.device | None,
        codec: Codec | None,
        compressible: Collection[str],
    ) -> None:
        self._ring: Ring[Entry] = Ring(capacity, max_uses)
        self.capacity, self.max_uses = capacity, max_uses
        self._device, self._codec, self._compressible = device, codec, set(compressible)
        self._codecs: dict[str, Codec] = {}

    def write(self, batch: Stored) -> Entry:
        """Store a batch over the oldest one; return its entry."""
        plain, encoded = {}, {}
        for name, value in batch.values.items():
            codec = self._codec_of(name, value)
            if codec is None:
                plain[name] = self._here(value)
            else:
                encoded[name] = self._here(codec.encode(value))
        entry: Entry = {
            "values": plain,
            "encoded": encoded,
            "inputs": {name: self._here(value) for name, value in batch.inputs.items()},
            "target": self._here(batch.target),
            "plain_bytes": _bytes([batch.values, dict(batch.inputs), batch.target]),
        }
        self._ring.write(entry)
        return entry

    def take(self, device: torch.device) -> Stored | None:
        """Return the batch whose turn it is, on a device, or None."""
        entry = self._ring.take()
        if entry is None:
            return None
        decoded = {name: self._codecs[name].decode(to_device(e, device)) for name, e in entry["encoded"].items()}
        values = {**to_device(entry["values"], device), **decoded}
        return Stored(values, to_device(entry["inputs"], device), to_device(entry["target"], device), entry)

    def drop(self, entry: Entry) -> None:
        """Take a batch out."""
        self._ring.drop(entry)

    def bytes(self) -> tuple[int, int]:
        """Return the bytes held, codebooks included, and those of the same batches uncompressed."""
        entries = self._ring.state_dict()["items"]
        held = _bytes([[e["values"], e["encoded"], e["inputs"], e["target"]] for e in entries])
        return held + sum(c.overhead_bytes for c in self._codecs.values()), sum(e["plain_bytes"] for e in entries)

    def snapshot(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes back: the batches, not copied, and their counts."""
        return self._ring.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Undo writes and uses since a :meth:`snapshot`."""
        self._ring.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return batches, counts, and codebooks."""
        return {"ring": self._ring.state_dict(), "codecs": {n: c.state_dict() for n, c in self._codecs.items()}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state; batches go where this buffer keeps them, by default to `device`."""
        ring = dict(state["ring"])
        ring["items"] = [to_device(item, self._device or device) for item in ring["items"]]
        self._ring.load_state_dict(ring)
        self._codecs = {}
        for name, saved in state["codecs"].items():
            assert self._codec is not None
            self._codecs[name] = self._codec.fresh()
            self._codecs[name].load_state_dict(saved)

    def _codec_of(self, name: str, value: Any) -> Codec | None:
        if self._codec is None or name not in self._compressible or not isinstance(value, Tensor):
            return None
        if not encodable(value):
            return None
        return self._codecs.setdefault(name, self._codec.fresh())

    def _here(self, value: Any) -> Any:
        return to_device(value, self._device) if self._device is not None else value


def _bytes(value: Any) -> int:
    """Return the bytes of the storages behind a nested value, each once."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
