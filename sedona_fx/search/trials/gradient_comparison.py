"""The first part of the guided search: train one set of weights along random plans, and compare gradients on the way.

Each step is a step of ``Greedy`` along another plan, drawn at random: so gradients are compared at weights such as
local losses lead to, and heads keep up with the activations that they read. Comparing them in a net that is trained by
backpropagation, with all heads beside it, ranked plans worse and cost more (docs/search.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sedona_fx.rng import block_seed
from sedona_fx.search.problem.sampling import sample_plans
from sedona_fx.search.session.batches import Batch, split
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.alignment import Alignment, measure
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort
from sedona_fx.search.trials.supernet import Supernet

_FIRST_COMPARED = 0.5
"""Gradients are compared in the last part of the training, behind this share of it: early ones say little."""


@dataclass
class Comparison:
    """Where it stands can be saved and restored.

    Args:
        net: to train.
        steps: training steps.
        states: how often gradients are compared, evenly spread over the last half of the steps.
        batch_size: samples in a step; a comparison has twice as many. Larger batches are split. None: whole ones.
        descent: how the net trains, at a constant rate.
        cuts: of the random plans.
        seed: of the random plans.
    """

    net: Supernet
    steps: int
    states: int
    batch_size: int | None
    descent: Descent
    cuts: int
    seed: int
    step: int = field(default=0, init=False)
    spent: float = field(default=0.0, init=False)
    met: list[Alignment] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._optimizer = self.descent.optimizer(self.net.parameters())
        self._kinds = [len(built) for built in self.net.heads]
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
        size = self.batch_size
        while self.step < self.steps:
            batch = next(train)
            for part in [batch] if size is None else split(batch, size):
                if self.step == self.steps:
                    break
                self._train(part)
                self.spent += effort.warmup_step
                if self.step in self._marks:
                    whole = next(train)
                    found = measure(self.net, whole if size is None else split(whole, 2 * size)[0])
                    self.spent += effort.comparison
                    if all(np.isfinite(table).all() for table in (found.products, found.squares, found.truth)):
                        self.met.append(found)
            after_batch()
        return self.met

    def _train(self, batch: Batch) -> None:
        draws = random.Random(block_seed(self.seed, "plans", self.step))
        (plan,) = sample_plans(self._kinds, self.cuts, 1, draws, every=False)
        self.net.train(batch, self._optimizer, plan)
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
