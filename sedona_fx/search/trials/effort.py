"""What the parts of the guided search cost, in plain training steps, and how a budget is shared among them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sedona_fx.ir.graph import info
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.problem.problem import Problem
from sedona_fx.search.problem.work import HEAD_OVERHEAD, work
from sedona_fx.search.session.batches import Batch, split
from sedona_fx.search.session.timing import TIMED_STEPS, seconds_of
from sedona_fx.search.trials.alignment import measure
from sedona_fx.search.trials.successive_halving import affordable
from sedona_fx.search.trials.supernet import Supernet

_BACKWARD = 2 / 3  # of a training step

_FLOPS_AN_OPERATOR = {"cpu": 1.7e6}
"""Forward FLOPs that a device could do in the time that an operator takes however small its tensors are.

On a CPU core: 80 to 93 us for an operator of a training step, its share of the optimizer's step included, where the
core does 50 to 80 GFLOPs a second (seven nets, steps of 16 to 1,100 ms; benchmarks/guided_cost.py).
"""
_FLOPS_AN_OPERATOR_ELSEWHERE = 4e8
"""The same on an accelerator: 60 us, 20 TFLOPs a second. Not measured; by what launching kernels is known to take."""


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

        A comparison, of twice as many samples, walks back from every head through the stretches in front of it. Costs
        are of two kinds: what the tensors' sizes make, and what every operator takes, whatever their sizes
        (:func:`overhead`).
        """
        heads = work(problem, places).heads
        count = sum(len(problem.candidates[place]) for place in places)
        runs = plan_costs(problem).runs["block_flops"]
        total = max(1.0, float(runs[0][len(places)]))
        walks = sum(len(problem.candidates[place]) * runs[0][k] / total for k, place in enumerate(places))
        along = heads * (problem.blocks - 1) / count  # a plan's share of the heads, on average
        compared = 1 + heads + _BACKWARD * walks
        fixed = overhead(problem)
        step = (1 + along) / parts + fixed
        return cls(step / (1 + fixed), (compared * min(1.0, 2 / parts) + (1 + _BACKWARD * walks) * fixed) / (1 + fixed))

    @property
    def least(self) -> int:
        """What pays for one comparison and a step in front of it, in whole training steps."""
        return math.ceil(self.comparison + self.warmup_step)

    @property
    def of_measuring(self) -> float:
        """What :meth:`seconds` costs."""
        return TIMED_STEPS * self.warmup_step + self.comparison

    def too_little(self, given: str, enough: str) -> ValueError:
        """Return the error for a budget below :attr:`least`, as given, with what would do."""
        return ValueError(
            f"{given} does not pay for a search: to compare the gradients of all heads once costs as much as "
            f"{self.comparison:.1f} training steps. Raise {enough} or more, or use 'balanced' or 'uniform' cuts, which "
            "need no search."
        )

    def seconds(self, net: Callable[[], Supernet], batch: Batch, batch_size: int | None, cuts: int) -> float:
        """Return how long what costs as much as a training step takes here: by a few steps and a comparison on a copy.

        Args:
            net: makes a copy of the net and its heads.
            batch: a training batch.
            batch_size: samples in a step; None: the whole batch.
            cuts: K - 1.
        """
        tried = net()
        optimizer = torch.optim.SGD(tried.parameters(), lr=0.0)
        plan = tuple((place, 0) for place in range(cuts))
        part = compared = batch
        if batch_size is not None:
            part, compared = split(batch, batch_size)[0], split(batch, 2 * batch_size)[0]
        device = next(iter(tried.parameters())).device
        steps = [seconds_of(lambda: tried.train(part, optimizer, plan), device) for _ in range(TIMED_STEPS)][1:]
        comparison = seconds_of(lambda: measure(tried, compared), device)
        return (statistics.median(steps) + comparison) / (self.warmup_step + self.comparison)

    def share(self, budget: int, states: int, finalists: int, epoch: int, problem: Problem) -> Shares:
        """Share training steps: half for rollouts if that pays for an epoch of them, else all for the gradients.

        Of the gradients' part, at most half goes into comparisons.

        Raises:
            ValueError: the budget does not pay for one comparison.
        """
        if budget < self.least:
            raise self.too_little(f"training_steps={budget}", f"training_steps to {self.least}")
        rollout_steps, spent = 0, 0.0
        if finalists > 1:
            # A plan costs at most a step of the net and its heads; what plans share makes it less.
            plan = 1 + HEAD_OVERHEAD * _heads_of_a_plan(problem)
            rollout_steps, spent = affordable(budget / 2, finalists, plan)
        if rollout_steps < epoch or budget - spent < self.least:
            rollout_steps, spent = 0, 0.0
        left = budget - spent
        taken = max(1, min(states, math.floor(left / 2 / self.comparison)))
        steps = math.floor((left - taken * self.comparison) / self.warmup_step)
        cost = steps * self.warmup_step + taken * self.comparison + spent
        return Shares(steps, taken, finalists if rollout_steps else 0, rollout_steps, cost)


def overhead(problem: Problem) -> float:
    """Return what the operators of a training step take however small its batch is, in terms of what the batch makes.

    0: nothing. 1: half of the step, so that another step of a small batch costs no less than half of a whole one.
    """
    graph, device = problem.train.graph, next(problem.train.parameters()).device.type
    operators = sum(node.op in ("call_module", "call_function", "call_method") for node in graph.nodes)
    flops = max(1, sum(info(node).flops for node in graph.nodes))
    return operators * _FLOPS_AN_OPERATOR.get(device, _FLOPS_AN_OPERATOR_ELSEWHERE) / flops


def _heads_of_a_plan(problem: Problem) -> float:
    """Return the FLOPs of the dearest heads of a plan against the net's."""
    costs = plan_costs(problem)
    total = max(1.0, float(costs.runs["block_flops"][0][len(costs.places)]))
    dearest = sorted((max(row) for row in costs.heads["head_flops"]), reverse=True)
    return sum(dearest[: problem.blocks - 1]) / total
