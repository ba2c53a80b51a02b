"""The buffer between two blocks that do not wait for each other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sedona_fx.errors import CheckpointError, ScheduleError

Item = TypeVar("Item")


class Ring(Generic[Item]):
    """The last `capacity` batches of a block's output, each with the number of times that the next block used it.

    The buffer of asynchronous DGL (Belilovsky, Eickenberg, Oyallon; ICML 2020, Algorithm 2). A batch is written over
    the oldest one when the ring is full. The next block takes, among the batches with the smallest use count, the most
    recently written; the count is 1 on writing and grows by 1 per use. The authors' released code compares the index
    the other way round at the write pointer, and so takes the *oldest* eligible batch of a full buffer: here it is the
    rule as the paper states it.

    Args:
        capacity: how many batches are kept, M in the paper.
        max_uses: how often a batch may be taken; None: any number of times.

    Raises:
        ScheduleError: `capacity` or `max_uses` is no whole number of 1 or more.
    """

    def __init__(self, capacity: int, max_uses: int | None = None) -> None:
        _check("capacity", capacity, "a buffer holds at least one batch")
        if max_uses is not None:
            _check("max_uses", max_uses, "a batch that may not be used trains nothing; None is no limit")
        self.capacity, self.max_uses = capacity, max_uses
        self._entries: deque[_Entry[Item]] = deque(maxlen=capacity)  # oldest first; drops the oldest when full

    def write(self, item: Item) -> None:
        """Store a batch, over the oldest one when the ring is full."""
        self._entries.append(_Entry(item))

    def take(self) -> Item | None:
        """Return the batch whose turn it is and count the use, or None if no batch may be used any more."""
        if not self._entries:
            return None
        fewest = min(self.counts)
        if self.max_uses is not None and fewest > self.max_uses:
            return None
        entry = next(entry for entry in reversed(self._entries) if entry.count == fewest)
        entry.count += 1
        return entry.item

    def drop(self, item: Item) -> None:
        """Take a batch out, wherever it stands; nothing happens if it is not there any more."""
        kept = [entry for entry in self._entries if entry.item is not item]
        self._entries.clear()
        self._entries.extend(kept)

    @property
    def counts(self) -> list[int]:
        """The use counts in the order of writing, oldest first; 1 is a batch that was never taken."""
        return [entry.count for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the batches as they are, oldest first, and their counts."""
        return {
            "capacity": self.capacity,
            "max_uses": self.max_uses,
            "items": [entry.item for entry in self._entries],
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: the state belongs to a ring with other limits, or is not complete; nothing is loaded then.
        """
        for name, ours in (("capacity", self.capacity), ("max_uses", self.max_uses)):
            if name not in state or state[name] != ours:
                raise CheckpointError(
                    f"the state is of a buffer with {name}={state.get(name)}, here it is {ours}. Make the schedule "
                    f"with {name}={state.get(name)} to go on from it."
                )
        items, counts = state.get("items"), state.get("counts")
        if not isinstance(items, list) or not isinstance(counts, list) or len(items) != len(counts):
            raise CheckpointError("the state of the buffer is damaged: it must hold one use count a batch.")
        if len(items) > self.capacity:
            raise CheckpointError(f"the state of the buffer is damaged: {len(items)} batches in {self.capacity} slots.")
        self._entries.clear()
        self._entries.extend(_Entry(item, int(count)) for item, count in zip(items, counts, strict=True))

    def __repr__(self) -> str:
        return f"Ring({len(self)} of {self.capacity} batches, counts={self.counts}, max_uses={self.max_uses})"


@dataclass
class _Entry(Generic[Item]):
    item: Item
    count: int = 1


def _check(name: str, value: int, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScheduleError(f"{name}={value!r} must be a whole number of 1 or more: {why}.")
