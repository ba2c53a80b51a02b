"""The buffer between two blocks of ``Replay``: a ring of batches on the buffer's device, compressed if asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.sources import to_device
from sedona_fx.errors import CheckpointError
from sedona_fx.files import is_count
from sedona_fx.train.buffers.codec import Codec, encodable
from sedona_fx.train.buffers.ring import Ring

Entry = dict[str, Any]
"""A batch in the ring: containers, tensors and plain values."""
_ENTRY = {"values", "encoded", "inputs", "target", "plain_bytes"}


@dataclass(frozen=True)
class Stored:
    """A batch for the next block.

    Attributes:
        values: what the next block and later ones read, by name, detached.
        inputs: the net's inputs by argument name, if a local loss looks at them.
        target: the target of the batch.
        entry: the entry of the ring that the batch was taken from; None before it is written.
    """

    values: dict[str, Any]
    inputs: Mapping[str, Any]
    target: Any
    entry: Entry | None = None


class Buffer:
    """The last batches that a block wrote, for the next block.

    Args:
        capacity: how many batches are kept.
        max_uses: how often a batch may be used; None: any number of times.
        device: where batches are kept; None: on the device on which they are written.
        codec: how activations are compressed; each has a fresh codec of its own. None: not at all.
        compressible: the names of the values that are activations; others are not compressed.
    """

    def __init__(
        self,
        capacity: int,
        max_uses: int | None,
        *,
        device: torch.device | None,
        codec: Codec | None,
        compressible: Collection[str],
    ) -> None:
        self._ring: Ring[Entry] = Ring(capacity, max_uses)
        self.capacity, self.max_uses = capacity, max_uses
        self._device, self._codec, self._compressible = device, codec, set(compressible)
        self._codecs: dict[str, Codec] = {}

    def write(self, batch: Stored) -> Entry:
        """Store a batch; it replaces the oldest one when the ring is full. Return its entry."""
        uncompressed, encoded = {}, {}
        for name, value in batch.values.items():
            codec = self._codec_of(name, value)
            if codec is None:
                uncompressed[name] = self._moved(value)
            else:
                encoded[name] = self._moved(codec.encode(value))
        entry: Entry = {
            "values": uncompressed,
            "encoded": encoded,
            "inputs": {name: self._moved(value) for name, value in batch.inputs.items()},
            "target": self._moved(batch.target),
            "plain_bytes": _storage_bytes([batch.values, dict(batch.inputs), batch.target]),
        }
        self._ring.write(entry)
        return entry

    def take(self, device: torch.device) -> Stored | None:
        """Return the batch to use next, decoded and on `device`; None if no batch may be used any more."""
        entry = self._ring.take()
        if entry is None:
            return None
        decoded = {name: self._codecs[name].decode(to_device(e, device)) for name, e in entry["encoded"].items()}
        values = {**to_device(entry["values"], device), **decoded}
        return Stored(values, to_device(entry["inputs"], device), to_device(entry["target"], device), entry)

    def drop(self, entry: Entry) -> None:
        """Remove a batch; nothing happens if it is no longer there."""
        self._ring.drop(entry)

    def bytes(self) -> tuple[int, int]:
        """Return the bytes held, codebooks included, and the bytes of the same batches uncompressed."""
        entries = self._ring.state_dict()["items"]
        held = _storage_bytes([[e["values"], e["encoded"], e["inputs"], e["target"]] for e in entries])
        return held + sum(c.overhead_bytes for c in self._codecs.values()), sum(e["plain_bytes"] for e in entries)

    def snapshot(self) -> dict[str, Any]:
        """Return the batches, not copied, and their counts, for :meth:`restore`."""
        return self._ring.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Undo all writes and uses since a :meth:`snapshot`."""
        self._ring.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the batches, their counts, and what the codecs have learned."""
        return {"ring": self._ring.state_dict(), "codecs": {n: c.state_dict() for n, c in self._codecs.items()}}

    def check_state(self, state: Any) -> None:
        """Check that a state can be loaded: into another buffer with the same settings, in memory.

        Raises:
            CheckpointError: it cannot.
        """
        limits, cpu = (self._ring.capacity, self._ring.max_uses), torch.device("cpu")
        twin = Buffer(*limits, device=cpu, codec=self._codec, compressible=self._compressible)
        try:
            twin.load_state_dict(state, cpu)
            complete = all(item.keys() == _ENTRY for item in state["ring"]["items"])
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
            raise CheckpointError(f"the state of a buffer is damaged: {type(error).__name__}: {error}.") from error
        if not complete or not all(is_count(count) and count for count in state["ring"]["counts"]):
            raise CheckpointError("the state of a buffer is damaged: it has no batches and counts of their uses.")

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state; batches are moved to where this buffer keeps them, or else to `device`."""
        ring = dict(state["ring"])
        ring["items"] = [to_device(item, self._device or device) for item in ring["items"]]
        self._ring.load_state_dict(ring)
        self._codecs = {}
        for name, saved in state["codecs"].items():
            assert self._codec is not None
            self._codecs[name] = self._codec.fresh()
            self._codecs[name].load_state_dict(saved)

    def _codec_of(self, name: str, value: Any) -> Codec | None:
        """Return the codec of a value, or None if it is not compressed."""
        if self._codec is None or name not in self._compressible or not isinstance(value, Tensor):
            return None
        if not encodable(value):
            return None
        return self._codecs.setdefault(name, self._codec.fresh())

    def _moved(self, value: Any) -> Any:
        return to_device(value, self._device) if self._device is not None else value


def _storage_bytes(value: Any) -> int:
    """Return the size of the storages of all tensors in a nested value, each once, in bytes."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
