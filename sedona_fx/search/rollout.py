"""Rollout: train candidate plans for a short while, and keep the one that does best."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from sedona_fx.cost import stretch_costs
from sedona_fx.errors import DataError, SearchDivergedError
from sedona_fx.graph import info
from sedona_fx.heads import head_name
from sedona_fx.outputs import OutputFormat
from sedona_fx.search.balanced import Balanced
from sedona_fx.search.plan_tree import Choice, PlanTree
from sedona_fx.search.problem import Decision, Problem, candidate_cost
from sedona_fx.search.relaxation import HEAD_OVERHEAD, named_batches
from sedona_fx.search.state import Batch, endless
from sedona_fx.search.uniform import uniform_layers


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Short greedy runs of candidate plans from the same first weights, on the same batches; successive halving.

    Cuts and heads are judged together. Blocks that plans have in common are trained once
    (:class:`~sedona_fx.search.plan_tree.PlanTree`). After a quarter and after a half of the steps the worse half of the
    plans is dropped, by the validation loss of the final output (successive halving: Jamieson, Talwalkar 2016); the
    best at the end is the decision.

    Args:
        steps: training steps of the plans that stay to the end. None: what `training_steps` pays for.
        training_steps: plain training steps that the search may cost. None: 25 epochs of the weights' data, a quarter
            of a run of 100.
        plans: candidates at most. Where there are more ways to cut and to choose heads, uniform cuts, balanced cuts and
            the latest cuts are among them, and the rest is drawn at random, each plan equally likely.
        lr: learning rate of the blocks' SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        val_batches: validation batches to score by, at most.
        val_batch_size: samples in a validation batch. None: as in training.
    """

    steps: int | None = None
    training_steps: int | None = None
    plans: int = 48
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    val_batches: int = 50
    val_batch_size: int | None = None

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "training_steps", "plans", "val_batches", "val_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Rollout({name}={value}): has to be at least 1")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            CutError: blocks share a parameter, or there are not enough places to cut.
            DataError: no data, or too small a budget.
            SearchDivergedError: every plan's loss turned infinite.
        """
        if problem.blocks == 1:
            return Decision([], [], {"search": "rollout"})
        if problem.data is None:
            raise DataError("search='rollout' needs data to search on.")
        plans = proposals(problem, self.plans)
        train, val, _ = problem.data
        device = next(problem.train.parameters()).device
        loss = _loss_of(problem.output, problem.loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)
            tree = PlanTree(problem, plans, self._sgd, loss, device)
            steps = self._steps(problem, tree)
            stream = endless(lambda: named_batches(train, problem.train, device), "training")
            fixed = list(itertools.islice(named_batches(val, problem.train, device), self.val_batches))
            try:
                return self._run(problem, tree, steps, stream, fixed)
            except ValueError as error:
                raise DataError(str(error)) from error

    def _run(
        self, problem: Problem, tree: PlanTree, steps: int, stream: Iterator[Batch], val: Sequence[Batch]
    ) -> Decision:
        """Train, halving on the way, and decide."""
        rounds, cost = [], 0.0
        done = 0
        with tqdm(total=steps, desc=f"rollout of {len(tree.plans())} plans", disable=not problem.progress) as bar:
            for stop in _stops(steps):
                share = tree_cost(problem, tree)
                for step in range(done, stop):
                    tree.train(next(stream), step)
                    bar.update()
                cost += share * (stop - done)
                done = stop
                scores = tree.evaluate(val)
                ranked = sorted(scores, key=lambda plan: scores[plan])
                rounds.append({"step": stop, "scores": [[_described(problem, p), scores[p]] for p in ranked]})
                bar.set_postfix(plans=len(ranked), best=f"{scores[ranked[0]]:.4f}")
                if stop < steps:
                    tree.keep(ranked[: math.ceil(len(ranked) / 2)])
        best = ranked[0]
        heads = [problem.candidates[place][k] for place, k in best]
        found = {"search": "rollout", "cost": {"equivalent_steps": cost, "steps": steps}, "rounds": rounds}
        if not math.isfinite(scores[best]):
            raise SearchDivergedError(f"in every plan, at step {done}", None)
        return Decision([place for place, _ in best], list(heads), found)

    def _sgd(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _steps(self, problem: Problem, tree: PlanTree) -> int:
        """Return how many steps the budget pays for, were the tree halved at each stop."""
        if self.steps is not None:
            return self.steps
        assert problem.data is not None
        budget = self.training_steps
        if budget is None:
            budget = 25 * sum(1 for _ in problem.data[0]())
        whole, one, count = tree_cost(problem, tree), tree_cost_of_one(problem, tree), len(tree.plans())
        each = [min(whole, math.ceil(count * part) * one) for part in (1.0, 0.5, 0.25)]  # at most, in each round

        def cost(steps: int) -> int:
            stops = [0, *_stops(steps)]
            return math.ceil(sum(s * (b - a) for s, (a, b) in zip(each, itertools.pairwise(stops), strict=False)))

        steps = bisect.bisect_right(range(1, budget + 1), budget, key=cost)
        if steps < 1:
            raise DataError(
                f"training_steps={budget} does not pay for a rollout: one step of all {len(tree.plans())} plans costs "
                f"as much as {whole:.0f} training steps. Raise training_steps, or try fewer plans."
            )
        return steps


def proposals(problem: Problem, count: int) -> list[Choice]:
    """Return up to `count` plans to try: all there are, or those by rule and a random sample of the others."""
    places, cuts = problem.places(), problem.blocks - 1
    kinds = [len(problem.candidates[place]) for place in places]
    if not all(kinds):
        raise DataError("search='rollout' chooses heads by local losses and cannot run with heads=False.")
    total = sum(math.prod(kinds[k] for k in chosen) for chosen in itertools.combinations(range(len(places)), cuts)) if (
        math.comb(len(places), cuts) <= 10_000
    ) else None  # fmt: skip
    if total is not None and total <= count:
        return [
            tuple((places[k], head) for k, head in zip(chosen, heads, strict=True))
            for chosen in itertools.combinations(range(len(places)), cuts)
            for heads in itertools.product(*(range(kinds[k]) for k in chosen))
        ]
    draw = random.Random(problem.seed)
    by_rule = [uniform_layers(len(places) + 1, problem.blocks), list(range(len(places) - cuts, len(places)))]
    balanced = Balanced().decide(problem).cuts
    by_rule.append([places.index(cut) for cut in balanced])
    found: dict[Choice, None] = {}
    for chosen in by_rule:
        for head in range(max(kinds)):
            found[tuple((places[k], min(head, kinds[k] - 1)) for k in chosen)] = None
    found = dict.fromkeys(list(found)[:count])
    while len(found) < count:
        drawn = sorted(draw.sample(range(len(places)), cuts))
        found[tuple((places[k], draw.randrange(kinds[k])) for k in drawn)] = None
    return list(found)


def _stops(steps: int) -> list[int]:
    """Return the steps after which plans are scored; but for the last, half of them go."""
    return sorted({math.ceil(steps * part) for part in (0.25, 0.5, 1.0)})


def tree_cost(problem: Problem, tree: PlanTree) -> float:
    """Return the cost of one step of all blocks of a tree, in training steps of the net, by FLOPs; heads count more."""
    return sum(_node_costs(problem, tree).values())


def tree_cost_of_one(problem: Problem, tree: PlanTree) -> float:
    """Return the cost of one step of the dearest plan alone."""
    costs = _node_costs(problem, tree)
    return max(
        sum(
            cost
            for (choice, last), cost in costs.items()
            if plan[: len(choice)] == choice and (not last or choice == plan)
        )
        for plan in tree.plans()
    )


def _node_costs(problem: Problem, tree: PlanTree) -> dict[tuple[Choice, bool], float]:
    """Return the cost of every block of a tree, as a share of a training step of the net."""
    total = max(1, sum(info(node).flops for node in problem.train.graph.nodes))
    flops: dict[tuple[str, ...], list[int]] = {}
    costs = {}
    for node in tree.nodes():
        cuts = tuple(place for place, _ in node.choice)
        if cuts not in flops:
            flops[cuts] = [c.flops for c in stretch_costs(problem.train, [problem.node(cut) for cut in cuts])[0]]
        own = flops[cuts][node.depth]
        if not node.last:
            place, head = node.choice[-1]
            own += int(HEAD_OVERHEAD * candidate_cost(problem, place, problem.node(place), head).flops)
        costs[node.choice, node.last] = own / total
    return costs


def _described(problem: Problem, plan: Choice) -> list[list[str]]:
    return [[place, str(head_name(problem.candidates[place][k]))] for place, k in plan]


def _loss_of(output: OutputFormat, loss: Any) -> Any:
    def local_loss(last: bool, local: Any, target: Any) -> torch.Tensor:
        return output.final_loss(loss, local, target) if last else output.head_loss(loss, local, target)

    return local_loss
