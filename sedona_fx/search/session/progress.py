"""What a search shows and writes down while it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from sedona_fx.search.session.journal import Journal
from sedona_fx.search.session.stream import Stream

log = logging.getLogger(__name__)


class Part(Protocol):
    """A part of a search that can be saved and restored."""

    spent: float

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        ...


class Watch:
    """A bar over the cost of a search, in plain training steps, and its journal.

    Args:
        journal: what is written to.
        fixed: what was decided before the start and is written each time.
        train: the data, whose place is written.
        total: cost of the whole search.
        what: text of the bar.
        progress: show it.
    """

    def __init__(
        self, journal: Journal, fixed: Mapping[str, Any], train: Stream, total: float, what: str, progress: bool
    ) -> None:
        self.spent, self.interrupted = 0.0, False
        self._journal, self._fixed, self._train = journal, fixed, train
        self._bar = tqdm(total=math.ceil(total), desc=what, unit="step", disable=not progress)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, **parts: Part) -> None:
        """Show what the parts that have begun cost."""
        self.spent = sum(part.spent for part in parts.values())
        self._bar.update(round(self.spent) - self._bar.n)

    def at(self, **parts: Part) -> None:
        """Show what the parts that have begun cost, and write down where they stand if it is time to."""
        self.show(**parts)
        if self._journal.due():
            states = {name: part.state_dict() for name, part in parts.items()}
            self._journal.write({**self._fixed, **states, "train": self._train.position})

    def interrupt(self, where: str) -> None:
        """Note that Ctrl-C ended the search."""
        self.interrupted = True
        log.warning("the search was interrupted at %s; deciding by what it has seen", where)
