"""What a schedule remembers between two calls of ``fit``: the epochs trained, and the LR schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

LRFactory = Callable[[torch.optim.Optimizer], LRScheduler]
"""Called with the optimizer of a block."""


@dataclass
class Fitted:
    """What ``fit`` did with a schedule so far.

    Attributes:
        epochs: epochs trained in all, those before a resume included.
        asked: epochs that the calls of this process asked for, as far as they returned. A resumed run may be ahead.
        factories: the factories of `rates`, one per optimizer.
        rates: the LR schedulers of the last call.
    """

    epochs: int = 0
    asked: int = 0
    factories: list[LRFactory | None] = field(default_factory=list)
    rates: list[LRScheduler] = field(default_factory=list)
    _file: tuple[Path, int, int] | None = None

    def rates_of(
        self, factories: Sequence[LRFactory | None], optimizers: Sequence[torch.optim.Optimizer | None]
    ) -> list[LRScheduler]:
        """Return the LR schedulers of those optimizers that have one.

        They are those of the call before if its factories were the same, so that they go on, and new ones otherwise.
        """
        pairs = zip(self.factories, factories, strict=False)
        if len(self.factories) != len(factories) or not all(_same(old, new) for old, new in pairs):
            made = zip(factories, optimizers, strict=True)
            self.rates = [make(optimizer) for make, optimizer in made if make is not None and optimizer is not None]
            self.factories = list(factories)
        return self.rates

    def wrote(self, path: Path) -> None:
        """Note that the file holds the state of the schedule as it is now."""
        self._file = _mark(path)

    def take_written(self, path: Path) -> bool:
        """Return whether the file is still the one of :meth:`wrote`; from now on it no longer is."""
        file, self._file = self._file, None
        return file is not None and file == _mark(path)


def _mark(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


def _same(old: Any, new: Any) -> bool:
    """Return whether two factories are the same: in a loop, a lambda is another object in every turn."""
    if isinstance(old, partial) and isinstance(new, partial):
        if len(old.args) != len(new.args) or old.keywords.keys() != new.keywords.keys():
            return False
        values = [*zip(old.args, new.args, strict=True), *((old.keywords[k], new.keywords[k]) for k in old.keywords)]
        return _same(old.func, new.func) and all(_equal(*pair) for pair in values)
    code = getattr(old, "__code__", None)
    if code is None or code is not getattr(new, "__code__", None):
        return _equal(old, new)
    return getattr(old, "__self__", None) is getattr(new, "__self__", None) and all(
        _equal(a, b) for a, b in zip(_bound(old), _bound(new), strict=True)
    )


def _bound(function: Any) -> list[Any]:
    """Return the values that a function closes over, and its defaults."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return [*cells, *(getattr(function, "__defaults__", None) or ())]


def _equal(old: Any, new: Any) -> bool:
    plain = (int, float, str, bool, tuple, list, type(None))
    return old is new or (isinstance(old, plain) and bool(old == new))
