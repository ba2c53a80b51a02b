"""What the parts of the guided search cost, in plain training steps, and how a budget is shared among them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sedona_fx.search.alignment import measure
from sedona_fx.search.pace import seconds_of
from sedona_fx.search.problem import Problem
from sedona_fx.search.relaxation import HEAD_OVERHEAD, work
from sedona_fx.search.splitting import split
from sedona_fx.search.state import Batch
from sedona_fx.search.supernet import Supernet

_BACKWARD = 2 / 3  # of a training step


@dataclass(frozen=True)
class Shares:
    """How often what is done; `cost` is that of all, in plain training steps."""

    warmup_steps: int
    states: int
    finalists: int
    rollout_steps: int
    cost: float

    def counts(self) -> dict[str, int]:
        """Return the numbers of steps, by name."""
        return {"warmup_steps": self.warmup_steps, "states": self.states, "rollout_steps": self.rollout_steps}

    def __str__(self) -> str:
        rollouts = f", {self.rollout_steps} steps of {self.finalists} plans" if self.rollout_steps else ""
        return (
            f"guided: {self.warmup_steps} steps, {self.states} states{rollouts} = {math.ceil(self.cost)} training steps"
        )


@dataclass(frozen=True)
class Effort:
    """Costs in plain training steps: a step of the warm-up, and a comparison of all gradients on a batch."""

    warmup_step: float
    comparison: float

    @classmethod
    def of(cls, problem: Problem, places: list[str], parts: int) -> Effort:
        """Estimate the costs for batches that the warm-up splits into `parts`.

        A comparison walks back from every head through the stretches in front of it.
        """
        heads = work(problem, places).heads
        runs = problem.plan_costs.runs["block_flops"]
        total = max(1.0, float(runs[0][len(places)]))
        walks = sum(len(problem.candidates[place]) * runs[0][k] / total for k, place in enumerate(places))
        return cls((1 + heads) / parts, 1 + heads + _BACKWARD * walks)

    def seconds(self, net: Callable[[], Supernet], batch: Batch, batch_size: int) -> float:
        """Return how long what costs as much as a training step takes here: by a few steps and a comparison on a copy.

        Args:
            net: makes a copy of the net and its heads.
            batch: a training batch.
            batch_size: samples in a step.
        """
        tried = net()
        optimizer = torch.optim.SGD(tried.parameters(), lr=0.0)
        heads = [(place, k) for place, built in enumerate(tried.heads) for k in range(len(built))]
        part = split(batch, batch_size)[0]
        device = next(iter(tried.parameters())).device
        steps = [seconds_of(lambda: tried.train(part, optimizer, heads), device) for _ in range(4)][1:]
        compared = seconds_of(lambda: measure(tried, batch), device)
        return (statistics.median(steps) + compared) / (self.warmup_step + self.comparison)

    def share(self, training_steps: int | None, states: int, finalists: int, problem: Problem) -> Shares:
        """Share `training_steps`: half for rollouts if that pays for an epoch of them, else all for the gradients.

        Of the gradients' part, at most half goes into comparisons. None: 25 epochs.

        Raises:
            ValueError: the budget does not pay for one comparison.
        """
        assert problem.data is not None
        epoch = max(1, problem.data[2] or sum(1 for _ in problem.data[0]()))
        budget = 25 * epoch if training_steps is None else training_steps
        # A plan costs at most a step of the net and its heads; what plans share makes it less.
        plan = finalists * (1 + HEAD_OVERHEAD * _heads_of_a_plan(problem))
        rollout_steps = math.floor(budget / 2 / plan) if finalists > 1 else 0
        rollout_steps = rollout_steps if rollout_steps >= epoch else 0
        left = budget - rollout_steps * plan
        taken = max(1, min(states, math.floor(left / 2 / self.comparison)))
        steps = math.floor((left - taken * self.comparison) / self.warmup_step)
        if steps < taken:
            need = math.ceil(self.comparison + self.warmup_step)
            raise ValueError(
                f"training_steps={budget} does not pay for a search: to compare the gradients of all heads once costs "
                f"as much as {self.comparison:.1f} training steps. Raise training_steps to {need} or more, or use "
                "'balanced' or 'uniform' cuts, which need no search."
            )
        cost = steps * self.warmup_step + taken * self.comparison + rollout_steps * plan
        return Shares(steps, taken, finalists if rollout_steps else 0, rollout_steps, cost)


def _heads_of_a_plan(problem: Problem) -> float:
    """Return the FLOPs of the dearest heads of a plan against the net's."""
    costs = problem.plan_costs
    total = max(1.0, float(costs.runs["block_flops"][0][len(costs.places)]))
    dearest = sorted((max(row) for row in costs.heads["head_flops"]), reverse=True)
    return sum(dearest[: problem.blocks - 1]) / total
