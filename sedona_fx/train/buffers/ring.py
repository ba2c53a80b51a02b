"""The ring of batches between two blocks of ``Replay``, and the rule by which the next block takes from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sedona_fx.errors import CheckpointError, ScheduleError

Item = TypeVar("Item")


class Ring(Generic[Item]):
    """The last `capacity` batches that a block wrote, each with a count of how often the next block has used it.

    The buffer of asynchronous DGL (Belilovsky, Eickenberg, Oyallon; ICML 2020, Algorithm 2). When the ring is full, a
    new batch replaces the oldest one. The next block takes, among the batches with the smallest use count, the most
    recently written; the count is 1 on writing and grows by 1 per use. The authors' released code compares the index
    the other way round at the write pointer, and so takes the *oldest* eligible batch of a full buffer; here the rule
    is the paper's.

    Args:
        capacity: how many batches are kept, M in the paper.
        max_uses: how often a batch may be taken; None: any number of times.

    Raises:
        ScheduleError: `capacity` or `max_uses` is not an integer of 1 or more.
    """

    def __init__(self, capacity: int, max_uses: int | None = None) -> None:
        _check_positive("capacity", capacity, "a buffer holds at least one batch")
        if max_uses is not None:
            _check_positive("max_uses", max_uses, "a batch that may not be used trains nothing; None is no limit")
        self.capacity, self.max_uses = capacity, max_uses
        self._entries: deque[_Entry[Item]] = deque(maxlen=capacity)  # oldest first; drops the oldest when full

    def write(self, item: Item) -> None:
        """Store a batch; it replaces the oldest one when the ring is full."""
        self._entries.append(_Entry(item))

    def take(self) -> Item | None:
        """Return the batch to use next and count the use; None if every batch has been used `max_uses` times."""
        if not self._entries:
            return None
        fewest = min(self.counts)
        if self.max_uses is not None and fewest > self.max_uses:
            return None
        entry = next(entry for entry in reversed(self._entries) if entry.count == fewest)
        entry.count += 1
        return entry.item

    def drop(self, item: Item) -> None:
        """Remove a batch; nothing happens if it is no longer there."""
        kept = [entry for entry in self._entries if entry.item is not item]
        self._entries.clear()
        self._entries.extend(kept)

    @property
    def counts(self) -> list[int]:
        """The use counts, oldest batch first; 1 for a batch that was never taken."""
        return [entry.count for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the batches, oldest first and not copied, and their counts."""
        return {
            "capacity": self.capacity,
            "max_uses": self.max_uses,
            "items": [entry.item for entry in self._entries],
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: the state is of a ring with other limits, or is damaged; nothing is loaded then.
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


def _check_positive(name: str, value: int, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScheduleError(f"{name}={value!r} must be a whole number of 1 or more: {why}.")
