"""The first part of the guided search: train the net with all its heads, and compare gradients on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sedona_fx.search.alignment import Alignment, measure
from sedona_fx.search.effort import Effort
from sedona_fx.search.halving import Descent
from sedona_fx.search.splitting import split
from sedona_fx.search.state import Batch
from sedona_fx.search.streams import Stream
from sedona_fx.search.supernet import Supernet

_FIRST_COMPARED = 0.5
"""Gradients are compared in the last part of the training, behind this share of it: early ones say little."""


@dataclass
class Comparison:
    """Where it stands can be saved and restored.

    Args:
        net: to train.
        steps: training steps.
        states: how often gradients are compared, evenly spread over the last half of the steps.
        batch_size: samples in a step; larger batches are split. None: whole batches.
        descent: how the net trains; its rate falls by a cosine.
    """

    net: Supernet
    steps: int
    states: int
    batch_size: int | None
    descent: Descent
    step: int = field(default=0, init=False)
    spent: float = field(default=0.0, init=False)
    met: list[Alignment] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._optimizer = self.descent.optimizer(self.net.parameters())
        self._heads = [(place, k) for place, built in enumerate(self.net.heads) for k in range(len(built))]
        rest = 1 - _FIRST_COMPARED
        shares = [_FIRST_COMPARED + rest * (k + 1) / self.states for k in range(self.states)]
        self._marks = {math.ceil(self.steps * share) for share in shares}

    def run(self, train: Stream, effort: Effort, after_batch: Callable[[], None]) -> list[Alignment]:
        """Train to the end; return what was compared. States whose gradients are not finite are left out.

        Args:
            train: batches.
            effort: what things cost.
            after_batch: is called on the way, where it can be saved.
        """
        while self.step < self.steps:
            batch = next(train)
            for part in split(batch, self.batch_size) if self.batch_size is not None else [batch]:
                if self.step == self.steps:
                    break
                self._train(part)
                self.spent += effort.warmup_step
                if self.step in self._marks:
                    found = measure(self.net, next(train))
                    self.spent += effort.comparison
                    if all(np.isfinite(table).all() for table in (found.products, found.squares, found.truth)):
                        self.met.append(found)
            after_batch()
        return self.met

    def _train(self, batch: Batch) -> None:
        rate = self.descent.lr * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        self._optimizer.param_groups[0]["lr"] = rate
        self.net.train(batch, self._optimizer, self._heads)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands; plain values and tensors, these not copied."""
        met = [[torch.from_numpy(t) for t in (m.products, m.squares, m.truth)] for m in self.met]
        return {
            "step": self.step, "spent": self.spent, "met": met, "net": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.step, self.spent = state["step"], state["spent"]
        self.met = [Alignment(*(t.numpy() for t in tables)) for tables in state["met"]]
        self.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
