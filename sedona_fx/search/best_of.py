"""Several seeds of one search: how far their plans differ, and the plan that wins on data that none of them saw."""

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
from sedona_fx.rng import seeded
from sedona_fx.search.problem.problem import Choice, Decision, Problem, Search, SearchData, local_loss_of
from sedona_fx.search.session.batches import named_batches
from sedona_fx.search.session.data import training_stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.plan_tree import PlanTree


@dataclass(frozen=True, kw_only=True)
class BestOf(Search):
    """Run a search with several seeds, train the distinct plans greedily for a short while, and keep the best.

    A part of the validation batches is kept from all the searches; the plans are judged by the loss of the final output
    there. They start from the same first weights and see the same batches; blocks that they have in common train once
    (:class:`~sedona_fx.search.trials.plan_tree.PlanTree`). The winner's provenance gets an entry ``seeds``: every run's plan
    and score, and how many runs cut at each place.

    Args:
        search: any search. If it has a ``folder``, each run gets one of its own inside.
        seeds: how many runs; their seeds follow on that of ``decouple``.
        steps: training steps of the distinct plans. None: an epoch of the weights' data.
        held_out: the part of the validation batches that judges. One epoch of these is kept in memory.
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
    def val_batch_size(self) -> int | None:
        """Samples in a validation batch, as the search wants them."""
        return self.search.val_batch_size

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            CutError: no heads to train plans by.
            DataError: no data, or a single validation batch.
            SearchDivergedError: the losses of all plans turned infinite.
        """
        if problem.blocks == 1:
            return self.search.decide(problem)
        data = problem.require_data("BestOf")
        problem.require_heads("BestOf")
        seen, judges = self._split(data.val, problem.seed)
        runs = []
        for seed in range(problem.seed, problem.seed + self.seeds):
            own = replace(problem, seed=seed, data=replace(data, val=lambda: iter(seen)))
            runs.append(_in_own_folder(self.search, seed).decide(own))
        choices = [problem.choice(run) for run in runs]
        scores = self._scores(problem, data, list(dict.fromkeys(choices)), judges)
        best = min(range(self.seeds), key=lambda k: scores[choices[k]])
        if not math.isfinite(scores[choices[best]]):
            raise SearchDivergedError("in the plans of all seeds", None)
        report = {
            "runs": [
                {
                    "seed": problem.seed + k,
                    "cuts": list(run.cuts),
                    "heads": [head_name(spec) if spec is not None else None for spec in run.heads],
                    "held_out_loss": scores[choice],
                }
                for k, (run, choice) in enumerate(zip(runs, choices, strict=True))
            ],
            "cut_by": dict(Counter(cut for run in runs for cut in run.cuts).most_common()),
            "distinct_plans": len(scores),
            "held_out_batches": len(judges),
        }
        return replace(runs[best], provenance={**runs[best].provenance, "seeds": report})

    def _split(self, val: Source, seed: int) -> tuple[list[Pair], list[Pair]]:
        """Return one epoch of validation batches in two parts: for the searches, and to judge by."""
        with seeded(torch.device("cpu"), seed):
            batches = list(val())
        if len(batches) < 2:
            raise DataError(
                f"BestOf judges on validation batches that no search sees, and there are {len(batches)} in all. "
                "Hand more val_data, or smaller batches."
            )
        kept = min(len(batches) - 1, max(1, round(self.held_out * len(batches))))
        return batches[:-kept], batches[-kept:]

    def _scores(
        self, problem: Problem, data: SearchData, plans: Sequence[Choice], judges: Sequence[Pair]
    ) -> dict[Choice, float]:
        """Return each plan's mean loss on the batches that judge, after a short greedy training."""
        device, train = problem.device, training_stream(problem, data)
        descent = Descent(self.lr, self.momentum, self.weight_decay)
        with seeded(device, problem.seed):
            tree = PlanTree(problem, plans, descent.optimizer, local_loss_of(problem), device)
            steps = self.steps or data.epoch_batches or train.length()
            for step in tqdm(range(steps), desc=f"plans of {self.seeds} seeds", disable=not problem.progress):
                tree.train(next(train), step)
            return tree.evaluate(named_batches(lambda: iter(judges), problem.train, device))


def _in_own_folder(search: Search, seed: int) -> Search:
    """Give a run a folder of its own inside the search's."""
    if search.folder is None or not dataclasses.is_dataclass(search):
        return search
    changed: Search = replace(search, folder=Path(search.folder) / f"seed-{seed}")
    return changed
