"""The first part of the guided search: train one set of weights along random plans, and compare gradients on the way.

Each step is a step of ``Greedy`` along another plan, drawn at random. So gradients are compared at weights of the kind
that local losses lead to, and heads keep up with the activations that they read. Comparing them in a net trained by
backpropagation, with all heads beside it, ranked plans worse and cost more (docs/search.md).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sedona_fx.errors import SearchDivergedError
from sedona_fx.files import is_count
from sedona_fx.rng import block_seed
from sedona_fx.runtime.guard import Snapshot
from sedona_fx.search.problem.sampling import sample_plans
from sedona_fx.search.session.batches import NamedBatch, split
from sedona_fx.search.session.progress import check_progress
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.alignment import Alignment, measure
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort
from sedona_fx.search.trials.supernet import Supernet

log = logging.getLogger(__name__)

_FIRST_COMPARED = 0.5
"""Gradients are compared after this share of the training: earlier ones say little."""


@dataclass
class Comparison:
    """Training along random plans with comparisons of gradients, which can be saved and restored between two batches.

    Args:
        net: what is trained.
        steps: training steps.
        states: how often gradients are compared, evenly spread over the last half of the steps.
        batch_size: samples per step; a comparison takes twice as many. Larger batches are split. None: whole batches.
        descent: how the net trains; its learning rate is constant.
        cuts: number of cuts of the random plans, K - 1.
        seed: of the random plans.

    Attributes:
        step: steps so far.
        spent: cost so far, in plain training steps.
        met: the comparisons so far.
        faults: how many steps were left out, since a loss or a gradient was not finite.
        first_fault: which one it was the first time, in words.
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
    faults: int = field(default=0, init=False)
    first_fault: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._optimizer = self.descent.optimizer(self.net.parameters())
        self._head_counts = [len(heads) for heads in self.net.heads]
        rest = 1 - _FIRST_COMPARED
        shares = [_FIRST_COMPARED + rest * (k + 1) / self.states for k in range(self.states)]
        self._compared_after = {math.ceil(self.steps * share) for share in shares}

    def run(self, train: Stream, effort: Effort, after_batch: Callable[[], None]) -> list[Alignment]:
        """Train to the end; return the comparisons. Steps and states whose gradients are not finite are left out.

        Args:
            train: batches.
            effort: what a step and a comparison cost.
            after_batch: called after every batch, where the state can be saved.

        Raises:
            SearchDivergedError: none of the steps, or of the states, was left.
        """
        size = self.batch_size
        while self.step < self.steps:
            batch = next(train)
            for part in [batch] if size is None else split(batch, size):
                if self.step == self.steps:
                    break
                self._train(part)
                self.spent += effort.warmup_step
                if self.step in self._compared_after:
                    whole = next(train)
                    self._compare(whole if size is None else split(whole, 2 * size)[0])
                    self.spent += effort.comparison
            after_batch()
        if self.states and not self.met:
            raise SearchDivergedError("in the gradients of every state", None, self.first_fault)
        if self.faults == self.steps > 0:
            raise SearchDivergedError(f"in each of {self.steps} training steps", None, self.first_fault)
        return self.met

    def skipped(self) -> dict[str, Any]:
        """Return how many steps were left out and why the first one was, as JSON; empty if none was."""
        return {"skipped_steps": {"count": self.faults, "first": self.first_fault}} if self.faults else {}

    def _compare(self, batch: NamedBatch) -> None:
        buffers = Snapshot(self.net.buffers())
        alignment = measure(self.net, batch)
        if all(np.isfinite(table).all() for table in (alignment.products, alignment.squares, alignment.truth)):
            self.met.append(alignment)
        else:
            buffers.restore()

    def _train(self, batch: NamedBatch) -> None:
        draws = random.Random(block_seed(self.seed, "plans", self.step))
        (plan,) = sample_plans(self._head_counts, self.cuts, 1, draws, every=False)
        if fault := self.net.train(batch, self._optimizer, plan):
            if not self.faults:
                self.first_fault = f"{fault} (training step {self.step})"
                log.warning("a step of the search was left out, as all others like it will be: %s", self.first_fault)
            self.faults += 1
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors; the tensors are not copied."""
        met = [[torch.from_numpy(t) for t in (m.products, m.squares, m.truth)] for m in self.met]
        return {
            "step": self.step, "spent": self.spent, "met": met, "net": self.net.state_dict(),
            "optimizer": self._optimizer.state_dict(), "faults": [self.faults, self.first_fault],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: its step, cost, counts or optimizer cannot be.
        """
        check_progress(state, self.steps, self._optimizer, state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]
        self.met = [Alignment(*(t.numpy() for t in tables)) for tables in state["met"]]
        self.faults, self.first_fault = state.get("faults", (0, ""))  # not in files from before it was written
        if not is_count(self.faults) or self.faults > self.step or not isinstance(self.first_fault, str):
            raise ValueError(f"its count of steps left out is {str(self.faults)[:50]}")
        self.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
