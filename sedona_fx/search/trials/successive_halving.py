"""Successive halving: train several plans at once, and drop the worse half of them twice on the way.

The scheme of Jamieson and Talwalkar (AISTATS 2016), in three rounds, which end after a quarter, a half and all of the
steps. In each round a cosine takes the learning rate to zero before plans are compared: at a constant rate the noise of
the last steps is as large as the differences between plans (docs/search.md).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sedona_fx.errors import SearchDivergedError
from sedona_fx.heads.registry import head_name
from sedona_fx.search.problem.problem import Choice, Problem, local_loss_of
from sedona_fx.search.session.batches import NamedBatch
from sedona_fx.search.session.progress import check_progress
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.supernet import Start
from sedona_fx.search.trials.tree_cost import tree_cost

ROUNDS = (0.25, 0.5, 1.0)
"""The parts of the steps after which rounds end."""


@dataclass
class Halving:
    """Successive halving of some plans, which can be saved and restored between any two steps.

    Args:
        problem: the net.
        plans: to choose among.
        descent: how blocks train; its learning rate is that of the beginning of each round.
        device: of the net.
        steps: training steps of the plans that stay to the end.

    Attributes:
        step: steps so far.
        spent: cost so far, in plain training steps.
        rounds: per round that has ended, as JSON, its step and the plans with their validation losses, best first.
        ranked: the plans that the last ended round has kept, best first; the final round keeps all of its plans.
    """

    problem: Problem
    plans: Sequence[Choice]
    descent: Descent
    device: torch.device
    steps: int = 1
    step: int = field(default=0, init=False)
    spent: float = field(default=0.0, init=False)
    rounds: list[dict[str, Any]] = field(default_factory=list, init=False)
    ranked: list[Choice] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.tree = PlanTree(self.problem, self.plans, self.descent.optimizer, local_loss_of(self.problem), self.device)
        self._cost = tree_cost(self.problem, self.tree)

    def begin(self, start: Start) -> None:
        """Take these initial weights instead of the net's own and those of freshly built heads."""
        for node in self.tree.nodes():
            node.load(start)

    def run(
        self, train: Stream, validation: Callable[[], Iterable[NamedBatch]], after_step: Callable[[], None]
    ) -> list[Choice]:
        """Train to the end; return the plans of the last round, best first.

        Args:
            train: batches.
            validation: returns the same batches at every call.
            after_step: called after every step, where the state can be saved.

        Raises:
            DataError: there are no validation batches.
            SearchDivergedError: no plan has finite losses and gradients.
        """
        stops = stops_of(self.steps)
        while self.step < self.steps:
            begin = max((stop for stop in stops if stop <= self.step), default=0)
            end = min(stop for stop in stops if stop > self.step)
            rate = self.descent.lr * (1 + math.cos(math.pi * (self.step - begin) / (end - begin))) / 2
            for node in self.tree.nodes():
                if node.optimizer is not None:
                    node.optimizer.param_groups[0]["lr"] = rate
            self.tree.train(next(train), self.step)
            self.step, self.spent = self.step + 1, self.spent + self._cost
            if self.step == end:
                self._end_round(self.tree.evaluate(validation()))
            after_step()
        return list(self.ranked)

    def _end_round(self, losses: Mapping[Choice, float]) -> None:
        ranked = sorted(losses, key=lambda plan: losses[plan])
        if not math.isfinite(losses[ranked[0]]):
            raise SearchDivergedError(f"in every plan, at step {self.step}", None, self.tree.fault())
        self.rounds.append({"step": self.step, "scores": [[self._named(plan), losses[plan]] for plan in ranked]})
        self.ranked = ranked
        if self.step < self.steps:
            self.ranked = ranked[: math.ceil(len(ranked) / 2)]
            self.tree.keep(self.ranked)
            self._cost = tree_cost(self.problem, self.tree)

    def _named(self, plan: Choice) -> list[list[str]]:
        """Return the plan as JSON, with the names of its heads."""
        return [[place, str(head_name(self.problem.candidates[place][k]))] for place, k in plan]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors; the tensors are not copied."""
        kept = [[list(pair) for pair in plan] for plan in self.tree.plans()]
        nodes = [
            {
                "modules": node.modules().state_dict(),
                "optimizer": node.optimizer.state_dict() if node.optimizer is not None else None,
                "failed": node.failed,
                "fault": node.fault,
            }
            for node in self.tree.nodes()
        ]
        ranked = [[list(pair) for pair in plan] for plan in self.ranked]
        return {
            "step": self.step, "spent": self.spent, "rounds": self.rounds, "kept": kept, "ranked": ranked,
            "nodes": nodes,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: its step or cost cannot be, or the state of an optimizer does not fit.
        """
        check_progress(state, self.steps)
        self.step, self.spent, self.rounds = state["step"], state["spent"], list(state["rounds"])
        self.tree.keep(_plan(plan) for plan in state["kept"])
        self.ranked = [_plan(plan) for plan in state["ranked"]]
        self._cost = tree_cost(self.problem, self.tree)
        for node, saved in zip(self.tree.nodes(), state["nodes"], strict=True):
            node.modules().load_state_dict(saved["modules"])
            if node.optimizer is not None:
                check_progress(state, self.steps, node.optimizer, saved["optimizer"])
                node.optimizer.load_state_dict(saved["optimizer"])
            node.failed, node.fault = saved["failed"], saved.get("fault", "")  # files from before it was written


def stops_of(steps: int) -> list[int]:
    """Return the steps after which plans are scored; after each but the last, half of the plans are dropped."""
    return sorted({math.ceil(steps * part) for part in ROUNDS})


def affordable(budget: float, count: int, one: float, whole: float = math.inf) -> tuple[int, float]:
    """Return how many steps of successive halving a budget pays for, 0 or more, and what they cost.

    Args:
        budget: in any unit, as all costs.
        count: plans at the start.
        one: cost of a step of one plan alone.
        whole: cost of a step of all plans, if known; less than `count` times `one`, since plans share blocks.
    """
    step_costs = [min(whole, math.ceil(count * part) * one) for part in (1.0, 0.5, 0.25)]  # upper bounds, by round

    def cost(steps: int) -> float:
        stops = [0, *stops_of(steps)]
        return sum(c * (end - begin) for c, (begin, end) in zip(step_costs, itertools.pairwise(stops), strict=False))

    most = math.floor(budget / step_costs[-1]) if step_costs[-1] else 0
    steps = bisect.bisect_right(range(1, most + 1), budget, key=cost)
    return steps, cost(steps) if steps else 0.0


def _plan(pairs: Sequence[Sequence[Any]]) -> Choice:
    return tuple((str(place), int(head)) for place, head in pairs)
