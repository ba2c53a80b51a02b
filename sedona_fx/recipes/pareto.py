"""The front of validation loss against cost: plans at every level of a cost, trained for a short while side by side."""

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
from sedona_fx.ir.stretches.shares import Measure
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
    """A plan that was tried.

    Attributes:
        plan: the plan.
        cost: its cost in bytes, FLOPs or seconds.
        loss: validation loss of its final output after the short training.
    """

    plan: Plan
    cost: float
    loss: float


@dataclass(frozen=True)
class Front:
    """The result of :func:`pareto`. ``print(front)`` shows it as a table.

    Attributes:
        cost: what was measured, a name of :class:`~sedona_fx.search.Limits`.
        points: the plans for which no other plan that was tried is better in cost or loss and no worse in the other,
            from the cheapest to the best.
        tried: all plans, from the cheapest to the dearest.
        steps: training steps of each plan.
    """

    cost: str
    points: tuple[FrontPoint, ...]
    tried: tuple[FrontPoint, ...]
    steps: int

    def plot(self, path: str | Path) -> Path:
        """Draw the front as a PNG file, with the points numbered as in the table of ``print(front)``.

        Returns:
            The path.

        Raises:
            MissingExtraError: the packages of the extra ``report`` are not installed.
        """
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
        titles = ["", f"{self.cost.replace('_', ' ')}, {unit}", "validation loss", "cuts", "heads"]
        return f"{len(self.points)} of {len(self.tried)} plans, {self.steps} steps each\n{table(titles, rows)}"


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
    """Find the front of validation loss against a cost: plans from the cheapest to the best.

    The range of the cost is divided into `points` levels. For each level, the exact dynamic program over cuts and heads
    draws plans that keep within it, as the best ones for random scores. All plans are then trained greedily from the
    same initial weights on the same batches, and blocks that plans have in common are trained once. The losses, of the
    final output after this short training, rank the plans; they are not what a full training reaches.

    Args:
        model: as in :func:`~sedona_fx.decouple`. It is not changed.
        data: as in ``decouple``; several batches.
        blocks: number of blocks K, at least 2.
        cost: ``"activation_bytes"``, ``"block_flops"``, ``"block_seconds"`` (measured on this machine) or
            ``"head_flops"``, as :class:`~sedona_fx.search.Limits` defines them.
        search: how plans are trained: ``"rollout"``, or a configured ``Rollout``, of which the steps (None: an epoch of
            the data for weights), the settings of SGD and the validation batches are used.
        points: number of levels of the cost, at least 2.
        plans_a_point: number of plans to try at each level, at least 1.
        seed: seeds the plans, the initial weights of heads, and the random draws in training.
        progress: whether to show a progress bar.
        options: further arguments of ``decouple``: ``loss``, ``heads``, ``val_data``, ``budget``, ...

    Returns:
        The front. Each of its plans can be given to ``decouple(plan=...)``.

    Raises:
        CutError: the cost or the search is not known, or there is a single block, no level, or no heads.
        DataError: there is no loss.
        SearchDivergedError: a loss or gradient of every plan was not finite.
        SedonaError: whatever else ``decouple`` raises.
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
        raise DataError("the front is made of short runs, which need data and a loss: hand loss=..., or leave it out.")
    trials = _Trials(measure=cost, settings=settings, levels=points, plans_per_level=plans_a_point)
    net = decouple(model, data, blocks=blocks, search=trials, seed=seed, progress=progress, **options)
    tried = []
    for trial in trials.outcome:
        decision = trial.decision
        plan = replace(
            net.plan,
            cuts=tuple(decision.cuts),
            heads=tuple(head_name(spec) if spec is not None else None for spec in decision.heads),
            block_seconds=decision.block_seconds,
            provenance={**net.plan.provenance, **decision.provenance},
        )
        tried.append(FrontPoint(plan, trial.cost, trial.loss))
    tried.sort(key=lambda point: (point.cost, point.loss))
    return Front(cost=cost, points=tuple(non_dominated(tried)), tried=tuple(tried), steps=trials.steps)


def non_dominated(tried: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Return the points with finite loss of which no other is better in cost or loss and no worse in the other.

    The cheapest comes first. Of points that are equal in both, one is returned.
    """
    front: list[FrontPoint] = []
    for point in sorted(tried, key=lambda p: (p.cost, p.loss)):
        if math.isfinite(point.loss) and (not front or point.loss < front[-1].loss):
            front.append(point)
    return front


@dataclass(frozen=True)
class _Trial:
    """One plan that was tried, with its cost and its validation loss."""

    decision: Decision
    cost: float
    loss: float


@dataclass
class _Trials(Search):
    """A search that tries plans at all levels of a cost and decides for the best; `outcome` keeps all of them."""

    measure: str
    settings: Rollout
    levels: int
    plans_per_level: int
    steps: int = 0
    fault: str = ""
    outcome: list[_Trial] = field(default_factory=list)

    needs_data: ClassVar[bool] = True

    @property
    def balances(self) -> Measure:
        return "activation_bytes" if self.measure == "activation_bytes" else "flops"

    @property
    def val_batch_size(self) -> int | None:
        return self.settings.val_batch_size

    def decide(self, problem: Problem) -> Decision:
        data = problem.require_data("pareto")
        problem.require_heads("pareto")
        choices = plans_by_level(problem, self.measure, self.levels, self.plans_per_level)
        losses = self._train(problem, data, choices)
        costs = plan_costs(problem)
        for choice, loss in losses.items():
            plan = tuple((problem.position(place), head) for place, head in choice)
            cost = costs.value(self.measure, plan)
            record = {"search": "pareto", "measure": self.measure, "cost": cost, "val_loss": loss, "steps": self.steps}
            seconds = dict(problem.seconds) if self.measure == "block_seconds" else None
            decision = replace(costs.decision(plan, record), block_seconds=seconds)
            self.outcome.append(_Trial(decision, cost, loss))
        best = min(self.outcome, key=lambda trial: trial.loss)
        if not math.isfinite(best.loss):
            raise SearchDivergedError(f"in every plan, within {self.steps} steps", None, self.fault)
        return best.decision

    def _train(self, problem: Problem, data: SearchData, choices: Sequence[Choice]) -> dict[Choice, float]:
        """Train all plans in one tree; return plan -> validation loss."""
        settings = self.settings
        train, val = training_stream(problem, data), validation_stream(problem, data)
        self.steps = settings.steps or data.epoch_batches or train.length()
        descent = Descent(settings.lr, settings.momentum, settings.weight_decay)
        with seeded_init(problem.seed):
            tree = PlanTree(problem, choices, descent.optimizer, local_loss_of(problem), problem.device)
            for step in tqdm(range(self.steps), desc=f"front of {len(choices)} plans", disable=not problem.progress):
                tree.train(next(train), step)
            self.fault = tree.fault()
            return tree.evaluate(itertools.islice(val.epoch(), settings.val_batches))


def plans_by_level(problem: Problem, measure: str, levels: int, plans_per_level: int) -> list[Choice]:
    """Return plans at every level of a cost, each plan once.

    The levels rise in equal ratios (in equal steps, if a plan may cost nothing) from the least that a plan can cost to
    the most that random plans cost. A plan is the dynamic program's best for scores drawn at random.

    Args:
        problem: the net to cut, with the user's own limits.
        measure: the cost, a name of :class:`~sedona_fx.search.Limits`.
        levels: number of levels, at least 2.
        plans_per_level: how many plans to return for each level at most. Plans that keep within the level but not
            within the one below come first.
    """
    generator = random.Random(problem.seed)
    costs = plan_costs(problem)

    def draw(limit: float | None) -> tuple[float, Choice] | None:
        """Return the cost of a random plan within a limit, and the plan; None if no plan keeps within it."""
        limits: dict[str, Any] = problem.limits.given() if problem.limits is not None else {}
        if limit is not None:
            limits[measure] = min(limit, limits.get(measure, math.inf))
        limited = replace(costs, problem=replace(problem, limits=Limits(**limits)))
        scores = [[generator.random() for _ in row] for row in costs.heads["head_flops"]]
        best = limited.best(scores, 1)
        if not best:
            return None
        plan = best[0].plan
        return costs.value(measure, plan), tuple((costs.places[b], m) for b, m in plan)

    least = costs.least(measure)[0]
    most = max(drawn[0] for _ in range(4 * levels) if (drawn := draw(None)) is not None)
    grid = np.geomspace(least, most, levels).tolist() if least > 0 else np.linspace(least, most, levels).tolist()
    chosen: dict[Choice, None] = {}
    for floor, limit in itertools.pairwise([-math.inf, least, *grid[1:-1], most]):
        above_floor: dict[Choice, None] = {}
        below: dict[Choice, None] = {}
        for _ in range(8 * plans_per_level):
            if len(above_floor) < plans_per_level and (drawn := draw(limit)) is not None:
                (above_floor if drawn[0] > floor else below)[drawn[1]] = None
        chosen.update(dict.fromkeys(list({**above_floor, **below})[:plans_per_level]))
    return list(chosen)


def _heads(plan: Plan) -> list[str]:
    return [head or "none" for head in plan.heads]
