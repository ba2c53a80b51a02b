"""Endless data whose position can be saved: an epoch of a stream depends on (seed, name of the stream, epoch) alone.

A stream draws from random states of its own: torch's, ``random``'s, numpy's, and those of the generators that the
data holds itself. Other draws in between (dropout, another stream) do not affect it, and it does not affect them. So
(epoch, batches consumed) is the whole position, and skipping that many batches leads back to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sedona_fx.errors import CheckpointError, DataError
from sedona_fx.files import is_count
from sedona_fx.rng import block_seed, random_states, restore_random
from sedona_fx.search.session.batches import Batches, NamedBatch


class Stream:
    """Batches of epoch after epoch, each epoch seeded by (seed, name, epoch).

    Not reproduced, since they lie outside of all random states: data with a position of its own that outlives an epoch,
    and workers of a ``DataLoader`` that persist from epoch to epoch.

    Args:
        epochs: starts an epoch of data at every call. Generators that it draws from may be listed in its attribute
            ``generators``: they are seeded too, and keep their own states whenever the stream is not drawing.
        name: of the stream; streams of different names are independent.
        seed: of the search.
    """

    def __init__(self, epochs: Batches, name: str, seed: int) -> None:
        self.name, self._epochs, self._seed = name, epochs, seed
        self._generators: Sequence[torch.Generator] = getattr(epochs, "generators", ())
        self._epoch, self._consumed = 0, 0
        self._batches: Iterator[NamedBatch] | None = None
        self._states: list[Any] = []

    def fresh(self) -> Stream:
        """Return another stream of the same batches, at the start of its first epoch."""
        return Stream(self._epochs, self.name, self._seed)

    def __iter__(self) -> Iterator[NamedBatch]:
        return self

    def __next__(self) -> NamedBatch:
        """Return the next batch.

        Raises:
            DataError: an epoch is empty.
        """
        batch = self._pull()
        if batch is None:
            if not self._consumed:
                raise DataError(f"the search's {self.name} data is empty")
            self._start(self._epoch + 1)
            return next(self)
        return batch

    def epoch(self) -> Iterator[NamedBatch]:
        """Yield the rest of this epoch."""
        while (batch := self._pull()) is not None:
            yield batch

    def length(self) -> int:
        """Return how many batches an epoch has, by going through the first one."""
        return sum(1 for _ in self.fresh().epoch())

    @property
    def position(self) -> list[int]:
        """The number of the epoch, and how many of its batches were consumed."""
        return [self._epoch, self._consumed]

    def go_to(self, position: Sequence[int]) -> None:
        """Go to a saved :attr:`position`, by going through the batches of that epoch before it.

        Raises:
            CheckpointError: the epoch has fewer batches than when the position was saved, or it is no position.
        """
        if not isinstance(position, (list, tuple)) or len(position) != 2 or not all(map(is_count, position)):
            raise CheckpointError(f"the search was saved at {str(position)[:50]}, which is no place in its data.")
        epoch, consumed = position
        self._start(epoch)
        for done in range(consumed):
            if self._pull() is None:
                raise CheckpointError(
                    f"the search was saved behind batch {consumed} of an epoch of its {self.name} data, which now ends "
                    f"after {done} batches. Go on with the data it was begun with."
                )

    def _start(self, epoch: int) -> None:
        self._epoch, self._consumed, self._batches = epoch, 0, None

    def _pull(self) -> NamedBatch | None:
        with self._own_random():
            if self._batches is None:
                self._reseed(block_seed(self._seed, self.name, self._epoch))
                self._batches = iter(self._epochs())
            batch = next(self._batches, None)
        self._consumed += batch is not None
        return batch

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Run the body with the stream's own random states in place of the global ones."""
        outside = self._random_states()
        if self._states:
            self._restore_random(self._states)
        try:
            yield
        finally:
            self._states = self._random_states()
            self._restore_random(outside)

    def _random_states(self) -> list[Any]:
        return [random_states([]), *(g.get_state() for g in self._generators)]

    def _restore_random(self, states: Sequence[Any]) -> None:
        restore_random(states[0])
        for generator, state in zip(self._generators, states[1:], strict=True):
            generator.set_state(state)

    def _reseed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in self._generators:
            generator.manual_seed(seed)
