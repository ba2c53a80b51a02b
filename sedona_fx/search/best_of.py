"""One search with several seeds: how far the plans differ, and the plan that is best on data that no run has seen."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from sedona_fx.data.sources import Pair, Source
from sedona_fx.errors import DataError, SearchDivergedError, SettingsError
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.stretches.shares import Measure
from sedona_fx.rng import seeded
from sedona_fx.search.problem.problem import Choice, Decision, Problem, Search, SearchData, local_loss_of
from sedona_fx.search.session.batches import named_batches
from sedona_fx.search.session.data import training_stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.plan_tree import PlanTree


@dataclass(frozen=True, kw_only=True)
class BestOf(Search):
    """Run a search with several seeds, train the distinct plans greedily for a short while, and keep the best.

    A part of the validation batches is held out from all runs; the plans are judged by the loss of the final output on
    them. All plans start from the same weights and see the same batches, and blocks that they have in common are
    trained once (:class:`~sedona_fx.search.trials.plan_tree.PlanTree`). The winner's provenance has an entry ``seeds``:
    every run's plan and loss, and how many runs cut at each place.

    Args:
        search: any search. If it has a ``folder``, each run gets a folder of its own inside.
        seeds: number of runs. The first has the seed of ``decouple``, the others those that follow it.
        steps: training steps of the distinct plans. None: one epoch of the training data.
        held_out: the part of the validation batches that judges plans, between 0 and 1. One epoch of validation batches
            is kept in memory.
        lr: learning rate of the blocks' SGD.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    search: Search
    seeds: int = 3
    steps: int | None = None
    held_out: float = 0.5
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.search, Search):
            raise SettingsError(
                f"BestOf(search={self.search!r}): hand a configured search such as Guided() or Sedona(unroll=1)"
            )
        if self.seeds < 1 or (self.steps is not None and self.steps < 1) or not 0 < self.held_out < 1:
            raise SettingsError(
                f"BestOf(seeds={self.seeds}, steps={self.steps}, held_out={self.held_out}): at least one seed and one "
                "step, and a part between 0 and 1"
            )

    @property
    def balances(self) -> Measure:
        """What the search balances."""
        return self.search.balances

    @property
    def val_batch_size(self) -> int | None:
        """Samples per validation batch, as the search asks for them."""
        return self.search.val_batch_size

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            CutError: there are no heads to train plans by.
            DataError: there is no data, or a single validation batch.
            SearchDivergedError: a loss or gradient of every plan was not finite.
        """
        if problem.blocks == 1:
            return self.search.decide(problem)
        data = problem.require_data("BestOf")
        problem.require_heads("BestOf")
        searched, held_out = self._split(data.val, problem.seed)
        seeds = range(problem.seed, problem.seed + self.seeds)
        runs = []
        for seed in seeds:
            seeded_problem = replace(problem, seed=seed, data=replace(data, val=lambda: iter(searched)))
            runs.append(_in_own_folder(self.search, seed).decide(seeded_problem))
        choices = [problem.choice(run) for run in runs]
        losses, fault = self._losses(problem, data, list(dict.fromkeys(choices)), held_out)
        best = min(range(self.seeds), key=lambda k: losses[choices[k]])
        if not math.isfinite(losses[choices[best]]):
            raise SearchDivergedError("in the plans of all seeds", None, fault)
        report = {
            "runs": [
                {
                    "seed": seed,
                    "cuts": list(run.cuts),
                    "heads": [head_name(spec) if spec is not None else None for spec in run.heads],
                    "held_out_loss": losses[choice],
                }
                for seed, run, choice in zip(seeds, runs, choices, strict=True)
            ],
            "cut_by": dict(Counter(cut for run in runs for cut in run.cuts).most_common()),
            "distinct_plans": len(losses),
            "held_out_batches": len(held_out),
        }
        return replace(runs[best], provenance={**runs[best].provenance, "seeds": report})

    def _split(self, val: Source, seed: int) -> tuple[list[Pair], list[Pair]]:
        """Return one epoch of validation batches in two parts: for the runs, and held out.

        Raises:
            DataError: there is at most one batch.
        """
        with seeded(torch.device("cpu"), seed):
            batches = list(val())
        if len(batches) < 2:
            raise DataError(
                f"BestOf judges on validation batches that no search sees, and there are {len(batches)} in all. "
                "Hand more val_data, or smaller batches."
            )
        count = min(len(batches) - 1, max(1, round(self.held_out * len(batches))))
        return batches[:-count], batches[-count:]

    def _losses(
        self, problem: Problem, data: SearchData, plans: Sequence[Choice], held_out: Sequence[Pair]
    ) -> tuple[dict[Choice, float], str]:
        """Return each plan's mean loss on the held-out batches, after a short greedy training; and why one failed."""
        device, train = problem.device, training_stream(problem, data)
        descent = Descent(self.lr, self.momentum, self.weight_decay)
        with seeded(device, problem.seed):
            tree = PlanTree(problem, plans, descent.optimizer, local_loss_of(problem), device)
            steps = self.steps or data.epoch_batches or train.length()
            for step in tqdm(range(steps), desc=f"plans of {self.seeds} seeds", disable=not problem.progress):
                tree.train(next(train), step)
            return tree.evaluate(named_batches(lambda: iter(held_out), problem.train, device)), tree.fault()


def _in_own_folder(search: Search, seed: int) -> Search:
    """Return the search with a folder for this run inside its own; without a folder, the search itself."""
    if search.folder is None or not dataclasses.is_dataclass(search):
        return search
    in_own_folder: Search = replace(search, folder=Path(search.folder) / f"seed-{seed}")
    return in_own_folder
