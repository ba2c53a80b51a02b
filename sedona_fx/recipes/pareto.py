"""The front of validation loss against cost: plans at every level of cost, trained for a short while side by side."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn
from tqdm import tqdm

from sedona_fx.decouple import decouple
from sedona_fx.errors import CutError, DataError, SearchDivergedError, did_you_mean
from sedona_fx.heads.registry import head_name
from sedona_fx.plan import Plan
from sedona_fx.report.picture import front_picture
from sedona_fx.report.text import in_units, table
from sedona_fx.rng import seeded_init
from sedona_fx.search import Decision, Limits, Problem, Rollout
from sedona_fx.search.problem.limits import MEASURES
from sedona_fx.search.problem.plan_costs import plan_costs
from sedona_fx.search.problem.problem import Choice, Search, SearchData, local_loss_of
from sedona_fx.search.session.data import training_stream, validation_stream
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.plan_tree import PlanTree


@dataclass(frozen=True)
class FrontPoint:
    """A plan, what it costs (bytes, FLOPs or seconds), and its validation loss after the short training."""

    plan: Plan
    cost: float
    loss: float


@dataclass(frozen=True)
class Front:
    """What :func:`pareto` found.

    Attributes:
        cost: the measure, one of the limits' names.
        points: the plans that no tried plan beats in both, from the cheapest to the best.
        tried: all plans, from the cheapest on.
        steps: training steps that each of them got.
    """

    cost: str
    points: tuple[FrontPoint, ...]
    tried: tuple[FrontPoint, ...]
    steps: int

    def plot(self, path: str | Path) -> Path:
        """Draw the front as a PNG, its points numbered as in the table of ``print(front)``; return the path."""
        front = [(point.cost, point.loss) for point in self.points]
        tried = [(point.cost, point.loss) for point in self.tried]
        plan = self.points[0].plan
        title = f"{plan.model}, {plan.blocks} blocks: {len(tried)} plans after {self.steps} steps"
        return front_picture(tried, front, self.cost, title, path)

    def __str__(self) -> str:
        values, unit = in_units(self.cost, [point.cost for point in self.points])
        rows = [
            [str(k), f"{value:.4g}", f"{point.loss:.4f}", ", ".join(point.plan.cuts), ", ".join(_heads(point.plan))]
            for k, (value, point) in enumerate(zip(values, self.points, strict=True), start=1)
        ]
        head = ["", f"{self.cost.replace('_', ' ')}, {unit}", "validation loss", "cuts", "heads"]
        return f"{len(self.points)} of {len(self.tried)} plans, {self.steps} steps each\n{table(head, rows)}"


def pareto(
    model: nn.Module,
    data: Any,
    *,
    blocks: int = 4,
    cost: str = "activation_bytes",
    search: str | Rollout = "rollout",
    points: int = 8,
    plans_a_point: int = 4,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Front:
    """Return plans from the cheapest to the best: the front of validation loss against a cost.

    The range of the cost is cut into `points` levels. For each, the exact programme over cuts and heads draws plans
    that keep within it, by random scores. All of them train greedily, from the same first weights, on the same batches;
    blocks that plans have in common train once. Losses are of the final output after the short training: they order
    plans, they are not what a full training reaches.

    Args:
        model: as in :func:`~sedona_fx.decouple`; not touched.
        data: as there, several batches.
        blocks: K, at least 2.
        cost: ``"activation_bytes"``, ``"block_flops"``, ``"block_seconds"`` (measured) or ``"head_flops"``, as
            :class:`~sedona_fx.search.Limits` defines them.
        search: how plans train: ``"rollout"``, or a configured ``Rollout``, of which the steps (None: an epoch of the
            weights' data), the settings of SGD and the validation batches are read.
        points: levels of the cost, at least 2.
        plans_a_point: plans to try at each.
        seed: of the plans, the weights of heads, and the draws in training.
        progress: show a bar.
        options: further arguments of ``decouple``: ``loss``, ``heads``, ``val_data``, ``budget``, ...

    Returns:
        The front; each of its plans can be given to ``decouple(plan=...)``.

    Raises:
        CutError: a cost or a search that is not known, a single block, or no heads.
        SearchDivergedError: every plan's loss turned infinite.
        SedonaError: what ``decouple`` raises.
    """
    if cost not in MEASURES:
        raise CutError(f"cost={cost!r} is not known{did_you_mean(str(cost), MEASURES)}; one of {list(MEASURES)}.")
    settings = Rollout() if search == "rollout" else search
    if not isinstance(settings, Rollout):
        raise CutError(f"search={search!r}: the front is made of short runs: 'rollout', or a configured Rollout(...).")
    if blocks == 1 or points < 2 or plans_a_point < 1:
        raise CutError(
            f"blocks={blocks}, points={points}, plans_a_point={plans_a_point}: a front takes at least 2 blocks, "
            "2 points and a plan a point."
        )
    for name in ("cuts", "plan"):
        if options.get(name) is not None:
            raise CutError(f"{name}=... leaves nothing to choose; leave it out to see the front.")
    if "loss" in options and options["loss"] is None:
        raise DataError("the front is made of short runs, which need data and a loss.")
    trials = _Trials(cost, settings, points, plans_a_point)
    net = decouple(model, data, blocks=blocks, search=trials, seed=seed, progress=progress, **options)
    tried = []
    for decision, value, loss in trials.outcome:
        heads = tuple(head_name(spec) if spec is not None else None for spec in decision.heads)
        found = {**net.plan.provenance, **decision.provenance}
        plan = replace(
            net.plan,
            cuts=tuple(decision.cuts),
            heads=heads,
            block_seconds=decision.block_seconds,
            provenance=found,
        )
        tried.append(FrontPoint(plan, value, loss))
    tried.sort(key=lambda point: (point.cost, point.loss))
    return Front(cost, tuple(non_dominated(tried)), tuple(tried), trials.steps)


def non_dominated(tried: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Return the points that no other one beats in cost and equals in loss, or the reverse; the cheapest first."""
    front: list[FrontPoint] = []
    for point in sorted(tried, key=lambda p: (p.cost, p.loss)):
        if math.isfinite(point.loss) and (not front or point.loss < front[-1].loss):
            front.append(point)
    return front


@dataclass
class _Trials(Search):
    """A search that tries plans at all levels of a cost, keeps what came out, and decides for the best."""

    measure: str
    settings: Rollout
    levels: int
    each: int
    steps: int = 0
    outcome: list[tuple[Decision, float, float]] = field(default_factory=list)

    needs_data: ClassVar[bool] = True

    @property
    def val_batch_size(self) -> int | None:
        return self.settings.val_batch_size

    def decide(self, problem: Problem) -> Decision:
        data = problem.require_data("pareto")
        problem.require_heads("pareto")
        choices = plans_by_level(problem, self.measure, self.levels, self.each)
        scores = self._train(problem, data, choices)
        costs = plan_costs(problem)
        for choice, loss in scores.items():
            plan = tuple((problem.position(place), head) for place, head in choice)
            value = costs.value(self.measure, plan)
            about = {"search": "pareto", "measure": self.measure, "cost": value, "val_loss": loss, "steps": self.steps}
            measured = dict(problem.seconds) if self.measure == "block_seconds" else None
            self.outcome.append((replace(costs.decision(plan, about), block_seconds=measured), value, loss))
        best, _, loss = min(self.outcome, key=lambda found: found[2])
        if not math.isfinite(loss):
            raise SearchDivergedError(f"in every plan, within {self.steps} steps", None)
        return best

    def _train(self, problem: Problem, data: SearchData, choices: Sequence[Choice]) -> dict[Choice, float]:
        """Train all plans in one tree, and return the validation loss of each."""
        settings = self.settings
        train, val = training_stream(problem, data), validation_stream(problem, data)
        self.steps = settings.steps or data.epoch_batches or train.length()
        descent = Descent(settings.lr, settings.momentum, settings.weight_decay)
        with seeded_init(problem.seed):
            tree = PlanTree(problem, choices, descent.optimizer, local_loss_of(problem), problem.device)
            for step in tqdm(range(self.steps), desc=f"front of {len(choices)} plans", disable=not problem.progress):
                tree.train(next(train), step)
            return tree.evaluate(itertools.islice(val.epoch(), settings.val_batches))


def plans_by_level(problem: Problem, measure: str, levels: int, each: int) -> list[Choice]:
    """Return plans at every level of a cost: up to `each` that keep within the level and, where there are, not within
    the one before.

    The levels go in equal ratios from the least that a plan can cost to the most that random plans cost. Plans are the
    programme's best for scores drawn at random.
    """
    draw = random.Random(problem.seed)
    costs = plan_costs(problem)

    def drawn(limit: float | None) -> tuple[float, Choice] | None:
        """Return a random plan within a limit and its cost."""
        given: dict[str, Any] = problem.limits.given() if problem.limits is not None else {}
        if limit is not None:
            given[measure] = min(limit, given.get(measure, math.inf))
        narrow = replace(costs, problem=replace(problem, limits=Limits(**given)))
        scores = [[draw.random() for _ in row] for row in costs.heads["head_flops"]]
        found = narrow.best(scores, 1)
        if not found:
            return None
        plan = found[0].plan
        return costs.value(measure, plan), tuple((costs.places[b], m) for b, m in plan)

    least = costs.least(measure)[0]
    most = max(found[0] for _ in range(4 * levels) if (found := drawn(None)) is not None)
    grid = np.geomspace(least, most, levels).tolist() if least > 0 else np.linspace(least, most, levels).tolist()
    chosen: dict[Choice, None] = {}
    for floor, limit in itertools.pairwise([-math.inf, least, *grid[1:-1], most]):
        here: dict[Choice, None] = {}
        others: dict[Choice, None] = {}
        for _ in range(8 * each):
            if len(here) < each and (found := drawn(limit)) is not None:
                (here if found[0] > floor else others)[found[1]] = None
        chosen.update(dict.fromkeys(list({**here, **others})[:each]))
    return list(chosen)


def _heads(plan: Plan) -> list[str]:
    return [head or "none" for head in plan.heads]
