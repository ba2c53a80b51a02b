"""Cost of the parts of searches by trial, in plain training steps, and how the guided search shares its steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sedona_fx.errors import SettingsError
from sedona_fx.ir.graph import info
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.problem.problem import Problem
from sedona_fx.search.problem.work import HEAD_OVERHEAD, work
from sedona_fx.search.session.batches import NamedBatch, split
from sedona_fx.search.session.timing import TIMED_STEPS, seconds_of
from sedona_fx.search.trials.alignment import measure
from sedona_fx.search.trials.successive_halving import affordable
from sedona_fx.search.trials.supernet import Supernet

_BACKWARD = 2 / 3  # of a training step

_FLOPS_PER_OPERATOR = {"cpu": 1.7e6}
"""Forward FLOPs that a device could do in the fixed time that an operator takes, however small its tensors are.

On a CPU core: 80 to 93 us per operator of a training step, its share of the optimizer's step included, while the core
does 50 to 80 GFLOPs per second (seven nets, steps of 16 to 1,100 ms; benchmarks/guided_cost.py).
"""
_FLOPS_PER_OPERATOR_ELSEWHERE = 4e8
"""The same on an accelerator: 60 us at 20 TFLOPs per second. Not measured: from known kernel launch times."""


@dataclass(frozen=True)
class Shares:
    """The number of steps of each kind.

    Attributes:
        warmup_steps: training steps along random plans.
        states: comparisons of gradients.
        finalists: plans that are rolled out; 0: none.
        rollout_steps: training steps of the plans that stay to the end.
        cost: of all together, in plain training steps.
    """

    warmup_steps: int
    states: int
    finalists: int
    rollout_steps: int
    cost: float

    def counts(self) -> dict[str, int]:
        """Return the numbers of steps by name, without the finalists."""
        return {"warmup_steps": self.warmup_steps, "states": self.states, "rollout_steps": self.rollout_steps}

    def __str__(self) -> str:
        rollouts = f", {self.rollout_steps} steps of {self.finalists} plans" if self.rollout_steps else ""
        return (
            f"guided: {self.warmup_steps} steps, {self.states} states{rollouts} = {math.ceil(self.cost)} training steps"
        )


@dataclass(frozen=True)
class Effort:
    """Costs in plain training steps.

    Attributes:
        warmup_step: of a step along a random plan.
        comparison: of comparing the gradients of all heads on a batch once.
    """

    warmup_step: float
    comparison: float

    @classmethod
    def of(cls, problem: Problem, places: list[str], parts: int) -> Effort:
        """Estimate the costs.

        A comparison goes back from every head through the stretches before it. The time of a step has two parts: one
        that grows with the tensors, and a fixed one per operator (:func:`overhead`).

        Args:
            problem: the net.
            places: the cut points.
            parts: how many micro-batches a batch is split into. A step takes one, a comparison two.
        """
        heads = work(problem, places).heads
        candidates = sum(len(problem.candidates[place]) for place in places)
        flops = plan_costs(problem).runs["block_flops"][0].tolist()  # of the net up to each place
        net_flops = max(1.0, float(flops[len(places)]))
        # All backward passes of a comparison but that of the final loss, in backward passes through the whole net.
        walks = sum(len(problem.candidates[place]) * flops[k] / net_flops for k, place in enumerate(places))
        plan_heads = heads * (problem.blocks - 1) / candidates  # a plan's share of the heads, on average
        fixed = overhead(problem)
        step = (1 + plan_heads) / parts + fixed
        compared = (1 + heads + _BACKWARD * walks) * min(1.0, 2 / parts) + (1 + _BACKWARD * walks) * fixed
        return cls(step / (1 + fixed), compared / (1 + fixed))

    @property
    def least(self) -> int:
        """Cost of one comparison and a step before it, in whole training steps."""
        return math.ceil(self.comparison + self.warmup_step)

    @property
    def of_measuring(self) -> float:
        """Cost of :meth:`seconds`."""
        return TIMED_STEPS * self.warmup_step + self.comparison

    def too_little(self, given: str, enough: str) -> SettingsError:
        """Return the error for fewer steps than :attr:`least`.

        Args:
            given: the setting as the user gave it: ``"training_steps=3"``.
            enough: what would be enough: ``"training_steps to 20"``.
        """
        return SettingsError(
            f"{given} does not pay for a search: to compare the gradients of all heads once costs as much as "
            f"{self.comparison:.1f} training steps. Raise {enough} or more, or use 'balanced' or 'uniform' cuts, which "
            "need no search."
        )

    def seconds(self, net: Callable[[], Supernet], batch: NamedBatch, batch_size: int | None, cuts: int) -> float:
        """Return the seconds that a cost of one training step takes, from timing a few steps and a comparison.

        Args:
            net: makes a copy of the net and its heads, to run them on.
            batch: a training batch.
            batch_size: samples per step; None: the whole batch.
            cuts: K - 1.
        """
        copied = net()
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.0)
        plan = tuple((place, 0) for place in range(cuts))
        trained_on = compared_on = batch
        if batch_size is not None:
            trained_on, compared_on = split(batch, batch_size)[0], split(batch, 2 * batch_size)[0]
        device = next(iter(copied.parameters())).device
        steps = [seconds_of(lambda: copied.train(trained_on, optimizer, plan), device) for _ in range(TIMED_STEPS)][1:]
        comparison = seconds_of(lambda: measure(copied, compared_on), device)
        return (statistics.median(steps) + comparison) / (self.warmup_step + self.comparison)

    def share(self, allowed_steps: int, states: int, finalists: int, epoch: int, problem: Problem) -> Shares:
        """Share training steps between the parts of the search.

        Half goes to rollouts if that pays for an epoch of them, otherwise nothing. Of the rest, at most half goes to
        comparisons.

        Args:
            allowed_steps: plain training steps.
            states: comparisons at most.
            finalists: plans to roll out at most; below 2, there are no rollouts.
            epoch: training batches per epoch.
            problem: the net.

        Raises:
            SettingsError: the allowed steps do not pay for one comparison.
        """
        if allowed_steps < self.least:
            raise self.too_little(f"training_steps={allowed_steps}", f"training_steps to {self.least}")
        rollout_steps, rollout_cost = 0, 0.0
        if finalists > 1:
            # An upper bound of a plan's step: blocks that plans share make it cheaper.
            plan_step = 1 + HEAD_OVERHEAD * _plan_heads_flops(problem)
            rollout_steps, rollout_cost = affordable(allowed_steps / 2, finalists, plan_step)
        if rollout_steps < epoch or allowed_steps - rollout_cost < self.least:
            rollout_steps, rollout_cost = 0, 0.0
        rest = allowed_steps - rollout_cost
        comparisons = max(1, min(states, math.floor(rest / 2 / self.comparison)))
        warmup_steps = math.floor((rest - comparisons * self.comparison) / self.warmup_step)
        return Shares(
            warmup_steps=warmup_steps,
            states=comparisons,
            finalists=finalists if rollout_steps else 0,
            rollout_steps=rollout_steps,
            cost=warmup_steps * self.warmup_step + comparisons * self.comparison + rollout_cost,
        )


def overhead(problem: Problem) -> float:
    """Return the fixed time of a training step's operators, relative to the time that grows with the batch.

    0: there is none. 1: it is half of the step, so that a step on however small a part of the batch costs at least half
    of a step on the whole.
    """
    graph, device = problem.train.graph, next(problem.train.parameters()).device.type
    operators = sum(node.op in ("call_module", "call_function", "call_method") for node in graph.nodes)
    flops = max(1, sum(info(node).flops for node in graph.nodes))
    return operators * _FLOPS_PER_OPERATOR.get(device, _FLOPS_PER_OPERATOR_ELSEWHERE) / flops


def _plan_heads_flops(problem: Problem) -> float:
    """Return the FLOPs of the most expensive heads that a plan may have, relative to the net's."""
    costs = plan_costs(problem)
    net_flops = max(1.0, float(costs.runs["block_flops"][0][len(costs.places)]))
    by_place = sorted((max(flops) for flops in costs.heads["head_flops"]), reverse=True)
    return sum(by_place[: problem.blocks - 1]) / net_flops
