"""Successive halving: train several plans at once, and drop the worse half now and then.

The scheme is that of Jamieson and Talwalkar (AISTATS 2016). Three rounds, which end after a quarter, a half and all of
the steps. In each the learning rate falls to nothing by a cosine, so that plans are compared at rest: at a constant
rate the noise of the last steps is as large as what plans differ by (docs/search.md).
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
from sedona_fx.search.session.batches import Batch
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.supernet import Start
from sedona_fx.search.trials.tree_cost import tree_cost

ROUNDS = (0.25, 0.5, 1.0)


@dataclass
class Halving:
    """Plans in training; where it stands can be saved and restored.

    Args:
        problem: the net.
        plans: to choose among.
        descent: how blocks train.
        device: of the net.
        steps: of the plans that stay to the end.
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
        """Take other first weights than the net's own and fresh heads."""
        for node in self.tree.nodes():
            node.load(start)

    def run(
        self, train: Stream, validation: Callable[[], Iterable[Batch]], after_step: Callable[[], None]
    ) -> list[Choice]:
        """Train to the end; return the plans of the last round, the best first.

        Args:
            train: batches.
            validation: the same batches at every call.
            after_step: is called on the way, where it can be saved.

        Raises:
            SearchDivergedError: every plan's loss turned infinite.
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
                self._judge(self.tree.evaluate(validation()))
            after_step()
        return list(self.ranked)

    def _judge(self, losses: Mapping[Choice, float]) -> None:
        ranked = sorted(losses, key=lambda plan: losses[plan])
        if not math.isfinite(losses[ranked[0]]):
            raise SearchDivergedError(f"in every plan, at step {self.step}", None)
        self.rounds.append({"step": self.step, "scores": [[self._described(p), losses[p]] for p in ranked]})
        self.ranked = ranked
        if self.step < self.steps:
            self.ranked = ranked[: math.ceil(len(ranked) / 2)]
            self.tree.keep(self.ranked)
            self._cost = tree_cost(self.problem, self.tree)

    def _described(self, plan: Choice) -> list[list[str]]:
        return [[place, str(head_name(self.problem.candidates[place][k]))] for place, k in plan]

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands; plain values and tensors, these not copied."""
        kept = [[list(pair) for pair in plan] for plan in self.tree.plans()]
        nodes = [
            {
                "modules": node.modules().state_dict(),
                "optimizer": node.optimizer.state_dict() if node.optimizer is not None else None,
                "failed": node.failed,
            }
            for node in self.tree.nodes()
        ]
        ranked = [[list(pair) for pair in plan] for plan in self.ranked]
        return {
            "step": self.step, "spent": self.spent, "rounds": self.rounds, "kept": kept, "ranked": ranked,
            "nodes": nodes,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.step, self.spent, self.rounds = state["step"], state["spent"], list(state["rounds"])
        self.tree.keep(_plan(plan) for plan in state["kept"])
        self.ranked = [_plan(plan) for plan in state["ranked"]]
        self._cost = tree_cost(self.problem, self.tree)
        for node, saved in zip(self.tree.nodes(), state["nodes"], strict=True):
            node.modules().load_state_dict(saved["modules"])
            if node.optimizer is not None:
                node.optimizer.load_state_dict(saved["optimizer"])
            node.failed = saved["failed"]


def stops_of(steps: int) -> list[int]:
    """Return the steps after which plans are scored; but for the last, half of them go."""
    return sorted({math.ceil(steps * part) for part in ROUNDS})


def affordable(budget: float, count: int, one: float, whole: float = math.inf) -> tuple[int, float]:
    """Return how many steps of successive halving a budget pays for, 0 or more, and what they cost.

    Args:
        budget: in any unit.
        count: plans at first.
        one: cost of a step of one plan alone.
        whole: cost of a step of all plans, where that is known to be less: for what they share.
    """
    each = [min(whole, math.ceil(count * part) * one) for part in (1.0, 0.5, 0.25)]  # at most, in each round

    def cost(steps: int) -> float:
        stops = [0, *stops_of(steps)]
        return sum(s * (b - a) for s, (a, b) in zip(each, itertools.pairwise(stops), strict=False))

    most = math.floor(budget / each[-1]) if each[-1] else 0
    steps = bisect.bisect_right(range(1, most + 1), budget, key=cost)
    return steps, cost(steps) if steps else 0.0


def _plan(pairs: Sequence[Sequence[Any]]) -> Choice:
    return tuple((str(place), int(head)) for place, head in pairs)
