"""What a search shows and saves while it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
from tqdm import tqdm

from sedona_fx.files import is_count
from sedona_fx.runtime.optimizer_state import optimizer_fault
from sedona_fx.search.session.journal import Journal
from sedona_fx.search.session.stream import Stream

log = logging.getLogger(__name__)


class Part(Protocol):
    """A part of a search that can be saved and restored.

    Attributes:
        spent: its cost so far, in plain training steps.
    """

    spent: float

    def state_dict(self) -> dict[str, Any]:
        """Return where the part stands."""
        ...


def check_progress(
    state: Mapping[str, Any], steps: int, optimizer: torch.optim.Optimizer | None = None, saved: Any = None
) -> None:
    """Check the saved step and cost of a part of a search, and the state of an optimizer if there is one.

    Args:
        state: what the part's ``state_dict`` returned.
        steps: that the part takes.
        optimizer: that is to load `saved`.
        saved: the state of the optimizer.

    Raises:
        ValueError: one of them cannot be.
    """
    step, spent = state["step"], state["spent"]
    if not is_count(step) or step > steps:
        raise ValueError(f"it is at step {str(step)[:50]} of {steps}")
    if not isinstance(spent, (int, float)) or not 0 <= spent < math.inf:
        raise ValueError(f"its cost is {str(spent)[:50]}")
    if optimizer is not None and (fault := optimizer_fault(optimizer, saved)):
        raise ValueError(f"of an optimizer, {fault}")


class Progress:
    """Progress bar over the cost of a search, and regular saves of where the search stands.

    A context manager: the bar is closed at the end.

    Args:
        journal: where states are saved.
        train: the training data, whose position is saved.
        fixed: what was decided before the start; saved with every state.
        total: cost of the whole search, in plain training steps.
        description: text of the bar.
        shown: whether to show the bar.

    Attributes:
        spent: cost so far, in plain training steps.
        interrupted: whether Ctrl-C ended the search.
    """

    def __init__(
        self,
        journal: Journal,
        train: Stream,
        *,
        fixed: Mapping[str, Any],
        total: float,
        description: str,
        shown: bool,
    ) -> None:
        self.spent, self.interrupted = 0.0, False
        self._journal, self._fixed, self._train = journal, fixed, train
        self._bar = tqdm(total=math.ceil(total), desc=description, unit="step", disable=not shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, **parts: Part) -> None:
        """Move the bar to what all parts that have begun cost so far."""
        self.spent = sum(part.spent for part in parts.values())
        self._bar.update(round(self.spent) - self._bar.n)

    def at(self, **parts: Part) -> None:
        """Move the bar, and save the states of all parts that have begun, under their names, if a save is due."""
        self.show(**parts)
        if self._journal.due():
            states = {name: part.state_dict() for name, part in parts.items()}
            self._journal.write({**self._fixed, **states, "train": self._train.position})

    def interrupt(self, where: str) -> None:
        """Note that Ctrl-C ended the search, at `where`."""
        self.interrupted = True
        log.warning("the search was interrupted at %s; deciding by what it has seen", where)
