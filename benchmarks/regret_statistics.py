"""What a table of trained plans says: how much plans differ, how good a chosen plan is, and how sure that is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, spearmanr

Plan = tuple[tuple[str, int], ...]
Array = np.ndarray


@dataclass(frozen=True)
class Table:
    """Every plan's accuracy: ``test`` (seeds, plans) at the end, ``loss`` (seeds, marks, plans) on the way."""

    plans: list[Plan]
    test: Array
    marks: list[int]
    loss: Array

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read what ``plan_table.py`` wrote."""
        seeds = [
            rows for _, rows in sorted(json.loads(path.read_text())["seeds"].items(), key=lambda item: int(item[0]))
        ]
        plans = [tuple((place, head) for place, head in row["plan"]) for row in seeds[0]]
        marks = sorted(int(mark) for mark in seeds[0][0]["at"])
        return cls(
            plans,
            np.array([[row["test"] for row in rows] for rows in seeds]),
            marks,
            np.array([[[row["at"][str(mark)][0] for row in rows] for mark in marks] for rows in seeds]),
        )

    def among(self, kept: Callable[[Plan], bool]) -> Table:
        """Return the table of some of the plans."""
        chosen = [k for k, plan in enumerate(self.plans) if kept(plan)]
        return Table([self.plans[k] for k in chosen], self.test[:, chosen], self.marks, self.loss[:, :, chosen])

    def spread(self) -> dict[str, float]:
        """Return the standard deviation between plans, that between seeds of one plan, and how seeds agree on ranks.

        Between seeds: what is left of a plan's accuracy when the seed's mean and the plan's mean are taken out. Between
        plans: of the plans' means, less what the seeds add to it.
        """
        seeds, plans = self.test.shape
        centred = self.test - self.test.mean(1, keepdims=True)
        noise = ((centred - centred.mean(0)) ** 2).sum() / ((seeds - 1) * (plans - 1))
        between = max(0.0, centred.mean(0).var(ddof=1) - noise / seeds)
        pairs = [spearmanr(self.test[a], self.test[b]).statistic for a, b in itertools.combinations(range(seeds), 2)]
        return {
            "plans": float(np.sqrt(between)),
            "seeds": float(np.sqrt(noise)),
            "rank_correlation": float(np.mean(pairs)),
        }

    def lost(self, chosen: Sequence[Plan]) -> Array:
        """Return (choices, seeds) accuracies lost against the best plan, which is taken from the other seeds."""
        own = [self.plans.index(plan) for plan in chosen]
        return np.stack([self._best(seed) - self.test[seed, own] for seed in range(len(self.test))], axis=1)

    def lost_on_average(self) -> Array:
        """Return (seeds,) what the mean plan loses."""
        return np.array([self._best(seed) - self.test[seed].mean() for seed in range(len(self.test))])

    def _best(self, seed: int) -> float:
        others = np.delete(self.test, seed, axis=0).mean(0)
        return float(self.test[seed, others.argmax()])

    def regret(self, chosen: Sequence[Plan]) -> tuple[float, float, float]:
        """Return what the chosen plans lose, as a share of what the mean plan loses, with a 95 % interval.

        0: as good as the best plan; 1: as good as a plan drawn at random. The interval is a bootstrap over the table's
        seeds and the choices (one a seed of the search), each drawn again with replacement.
        """
        lost, mean = self.lost(chosen), self.lost_on_average()

        def relative(choices: Array, seeds: Array) -> float:
            return float(lost[np.ix_(choices.astype(int), seeds.astype(int))].mean() / mean[seeds.astype(int)].mean())

        choices, seeds = np.arange(lost.shape[0]), np.arange(lost.shape[1])
        value = relative(choices, seeds)
        found = bootstrap(
            (choices, seeds) if len(choices) > 1 else (np.zeros(2), seeds),
            relative,
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        return value, float(found.confidence_interval.low), float(found.confidence_interval.high)

    def agreement(self, scores: dict[Plan, float]) -> float:
        """Return the rank correlation of scores (more is better) with the mean accuracy of the plans they are about."""
        known = [k for k, plan in enumerate(self.plans) if plan in scores]
        return float(spearmanr([scores[self.plans[k]] for k in known], self.test.mean(0)[known]).statistic)
