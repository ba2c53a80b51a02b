"""What plans cost, block by block, and which of them keep within the problem's limits.

Costs are of the example batch, the first batch of the data: ``activation_bytes`` in bytes, ``block_flops`` and
``head_flops`` in FLOPs of the forward pass, ``block_seconds`` in seconds of forward and backward on this machine
(:class:`~sedona_fx.search.problem.limits.Limits` has them in full). Places, stretches and blocks are numbered as in
:mod:`sedona_fx.search.problem.dynamic_program`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sedona_fx.errors import BudgetError, CutError, PlanError
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.cost import gradient_reach
from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import info
from sedona_fx.search.problem import dynamic_program
from sedona_fx.search.problem.block_seconds import measure_seconds
from sedona_fx.search.problem.dynamic_program import RankedPlan
from sedona_fx.search.problem.limits import MEASURES, Limits, amount
from sedona_fx.search.problem.problem import Choice, Decision, Positions, Problem, candidate_cost
from sedona_fx.search.problem.stretch_tables import run_bytes, run_flops_without_graph, run_sums


@dataclass(frozen=True)
class PlanCosts:
    """Costs of all blocks that plans over n places can have. Seconds are measured only when they are asked for.

    Attributes:
        problem: the net, its candidate heads and the limits.
        places: the cut points to choose from, n of them.
        runs: measure -> (n + 1, n + 1), int64 or float64: the cost of the stretches a to b without a head.
        heads: measure -> for each place the cost of each of its heads (a single 0 where it has none).

    Besides the measures that can be limited there is ``step_flops``: FLOPs of a training step, three times those of the
    forward pass, but once where frozen parameters run without a graph.
    """

    problem: Problem
    places: tuple[str, ...]
    runs: dict[str, np.ndarray]
    heads: dict[str, list[list[float]]]

    @classmethod
    def of(cls, problem: Problem, places: Sequence[str] | None = None) -> PlanCosts:
        """Count what all blocks between places cost.

        The bytes of a block are those of the storages that its stretches save for backward, each counted once; frozen
        parameters at the beginning of a block save nothing.

        Args:
            problem: the net, its candidate heads and the limits.
            places: the cut points to choose from. None: ``problem.places()``.
        """
        names = problem.places() if places is None else list(places)
        nodes = [problem.node(name) for name in names]
        flops, saved = [0] * (len(names) + 1), [dict[int, int]() for _ in range(len(names) + 1)]
        stretches = block_of(problem.train.graph, nodes)
        reach = gradient_reach(problem.train.graph, stretches)
        for node, stretch in stretches.items():
            flops[stretch] += info(node).flops
            if node not in reach:
                saved[stretch].update(info(node).saved)
        frozen = [(stretches[node], last, info(node)) for node, last in reach.items()]
        frozen_saved = [(at, last, *item) for at, last, record in frozen for item in record.saved.items()]
        frozen_flops = [(at, last, record.flops) for at, last, record in frozen]
        costs = [
            [candidate_cost(problem, name, node, m) for m in range(max(1, len(problem.candidates[name])))]
            for name, node in zip(names, nodes, strict=True)
        ]
        head_flops: list[list[float]] = [[cost.flops for cost in row] for row in costs]
        head_bytes: list[list[float]] = [[cost.activation_bytes for cost in row] for row in costs]
        runs = {"block_flops": run_sums(flops), "activation_bytes": run_bytes(saved, frozen_saved)}
        runs["step_flops"] = 3 * runs["block_flops"] - 2 * run_flops_without_graph(len(flops), frozen_flops)
        step_flops: list[list[float]] = [[3 * cost for cost in row] for row in head_flops]
        heads = {"block_flops": head_flops, "head_flops": head_flops, "activation_bytes": head_bytes}
        return cls(problem=problem, places=tuple(names), runs=runs, heads={**heads, "step_flops": step_flops})

    def table(self, measure: str) -> tuple[np.ndarray, list[list[float]]]:
        """Return the costs by `measure` of the stretches a to b without a head, and of the heads of each place."""
        if measure not in self.runs:
            stretches, heads = self._seconds()
            self.runs[measure], self.heads[measure] = run_sums(stretches), heads
        return self.runs[measure], self.heads[measure]

    def _seconds(self) -> tuple[list[float], list[list[float]]]:
        """Return the seconds of stretches and heads: ``problem.seconds``, measured anew if a head is missing there."""
        measured = self.problem.seconds
        names = {place: [head_name(spec) for spec in self.problem.candidates[place]] for place in self.places}
        if not all(set(heads) <= measured.get("heads", {}).get(place, {}).keys() for place, heads in names.items()):
            measured.clear()
        if not measured:
            measured.update(measure_seconds(self.problem, self.places))
        heads = [[measured["heads"][place][name] for name in names[place]] or [0.0] for place in self.places]
        # These places may be some of those that were measured: a stretch is then the sum of several.
        edges = [-1, *(measured["places"].index(place) for place in self.places), len(measured["places"])]
        stretches = [math.fsum(measured["stretches"][a + 1 : b + 1]) for a, b in itertools.pairwise(edges)]
        return stretches, heads

    def value(self, measure: str, plan: Positions) -> float:
        """Return what a plan costs: its largest block, or for ``head_flops`` all of its heads."""
        if measure == "head_flops":
            return sum(self.heads[measure][b][m] for b, m in plan)
        runs, heads = self.table(measure)
        starts = [0, *(b + 1 for b, _ in plan)]
        with_heads = [runs.item(a, b) + heads[b][m] for a, (b, m) in zip(starts, plan, strict=False)]
        return max([*with_heads, runs.item(starts[-1], len(self.places))])

    def within(self, plan: Positions, limits: Limits) -> bool:
        """Whether a plan keeps within all limits."""
        return all(self.value(measure, plan) <= limit for measure, limit in limits.given().items())

    def blocks(self, measure: str) -> np.ndarray:
        """Return (n + 1, n + 1, most heads of a place): the cost of the block of stretches a to b with head m.

        It is infinite where the place has no such head. The last block, b = n, has m = 0, which costs nothing.
        """
        runs, heads = self.table(measure)
        most = max((len(row) for row in heads), default=1)
        head_costs = np.full((len(heads) + 1, most), np.inf)
        for place, row in enumerate(heads):
            head_costs[place, : len(row)] = row
        head_costs[-1, 0] = 0.0
        costs: np.ndarray = runs[:, :, None] + head_costs[None]
        return costs

    def fits(self, limits: Limits | None) -> np.ndarray:
        """Return (n + 1, n + 1, most heads of a place), bool: the blocks that exist and keep within the block limits.

        These are all limits but ``head_flops``.
        """
        flops = self.blocks("block_flops")
        fits = np.isfinite(flops) & np.triu(np.ones(flops.shape[:2], dtype=bool))[:, :, None]
        for measure, limit in (limits.given() if limits is not None else {}).items():
            if measure != "head_flops":
                fits &= self.blocks(measure) <= limit
        return fits

    def best(
        self,
        scores: Sequence[Sequence[float]],
        count: int,
        fits: np.ndarray | None = None,
        cut_scores: Sequence[Sequence[float]] | None = None,
    ) -> list[RankedPlan]:
        """Return the best plans within the problem's limits, best first; none if there are none.

        Args:
            scores: ``scores[place][head]``, finite; lower is better.
            count: how many plans.
            fits: the blocks that may be used, in place of :meth:`fits` with the problem's limits.
            cut_scores: ``cut_scores[j][place]`` is added if the j-th cut is at the place.
        """
        limits = self.problem.limits
        return dynamic_program.best_plans(
            scores,
            self.problem.blocks,
            count=count,
            fits=self.fits(limits) if fits is None else fits,
            cut_scores=cut_scores,
            weights=[[int(flops) for flops in row] for row in self.heads["head_flops"]],
            limit=limits.head_flops if limits is not None else None,
        )

    def least(self, measure: str) -> tuple[float, Positions]:
        """Return the least that a plan can cost by one measure, whatever the limits, and a plan that costs it."""
        if measure == "head_flops":
            (lightest,) = dynamic_program.best_plans(self.heads[measure], self.problem.blocks, count=1)
            return lightest.score, lightest.plan
        result = dynamic_program.smallest_largest(self.blocks(measure), self.fits(None), self.problem.blocks)
        assert result is not None  # Problem.places() has made sure that there are enough places
        return result

    def decision(self, plan: Positions, provenance: Mapping[str, Any]) -> Decision:
        """Return a plan as a decision."""
        return self.problem.decision([(self.places[b], m) for b, m in plan], provenance)


def plan_costs(problem: Problem) -> PlanCosts:
    """Return what all plans over the problem's places cost; counted once for each problem."""
    if "plan_costs" not in problem.derived:
        problem.derived["plan_costs"] = PlanCosts.of(problem)
    costs: PlanCosts = problem.derived["plan_costs"]
    return costs


def allowed(problem: Problem, plan: Choice) -> bool:
    """Whether a plan keeps within the problem's limits. Takes tens of microseconds after the first call."""
    if problem.limits is None:
        return True
    positions = tuple((problem.position(place), head) for place, head in plan)
    return plan_costs(problem).within(positions, problem.limits)


def best_plans(problem: Problem, scores: Sequence[Sequence[float]], count: int = 10) -> list[Choice]:
    """Return the best plans within the problem's limits for additive scores, exactly, best first.

    Args:
        problem: the net, its candidates and its limits.
        scores: ``scores[k][m]`` of head m at place k of ``problem.places()``, finite; lower is better.
        count: how many plans; fewer are returned if there are no more.

    Raises:
        BudgetError: no plan keeps within the limits.
        ValueError: a score is not finite: an error in the code that calls this.
    """
    costs = plan_costs(problem)
    ranked = costs.best(scores, count)
    if not ranked:
        raise no_plan(costs)
    return [tuple((costs.places[b], m) for b, m in entry.plan) for entry in ranked]


def heads_tried(problem: Problem, preferred: Sequence[int]) -> np.ndarray:
    """Return the blocks that a rule may choose from, in the form of :meth:`PlanCosts.fits`.

    These are the blocks with the heads that the rule prefers, or, if no plan of them keeps within the limits, all.

    Args:
        problem: the net, its candidates and its limits.
        preferred: for each place the number of the preferred head.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs = plan_costs(problem)
    with_any_head = costs.fits(problem.limits)
    is_preferred = np.zeros(with_any_head.shape[1:], dtype=bool)
    is_preferred[np.arange(len(preferred) + 1), [*preferred, 0]] = True
    no_scores = [[0.0] * len(row) for row in costs.heads["head_flops"]]
    for fits in (with_any_head & is_preferred, with_any_head):
        if costs.best(no_scores, 1, fits):
            return fits
    raise no_plan(costs)


def no_plan(costs: PlanCosts) -> BudgetError:
    """Return the error for limits that no plan meets: the least possible value of each, and a plan that has it."""
    problem = costs.problem
    assert problem.limits is not None
    blocks, parts, each_alone = problem.blocks, [], True
    for measure, limit in problem.limits.given().items():
        least, plan = costs.least(measure)
        best = f"{amount(measure, least)} ({_described(costs.decision(plan, {}))})"
        if least > limit:
            each_alone = False
            parts.append(f"{measure}={amount(measure, limit)}: no plan with {blocks} blocks needs less than {best}")
        else:
            parts.append(f"{measure}={amount(measure, limit)}: can be met alone, down to {best}")
    together = " Each limit can be met alone, but no plan meets all of them together." if each_alone else ""
    return BudgetError(
        f"no plan keeps within the budget. {'; '.join(parts)}.{together} Raise the limits, ask for another number of "
        "blocks, offer smaller heads with heads=[...], or take smaller batches."
    )


def check_possible(problem: Problem) -> None:
    """Check that some plan keeps within the problem's limits, before a search begins.

    Raises:
        BudgetError: no plan does.
    """
    if problem.limits is not None:
        heads_tried(problem, [0] * len(plan_costs(problem).places))


def within_budget(problem: Problem, decision: Decision, error: type[CutError | PlanError]) -> Decision:
    """Return a decision with its limits and costs added to its provenance, if it keeps within the problem's limits.

    Its blocks are counted anew from its own cuts and heads, which need not be among the problem's candidates.

    Raises:
        CutError, PlanError: it exceeds a limit; the class is `error`, the message has the numbers.
    """
    if problem.limits is None:
        return decision
    heads = {cut: [head] if head is not None else [] for cut, head in zip(decision.cuts, decision.heads, strict=True)}
    seconds = dict(problem.seconds)
    fixed = replace(problem, candidates=heads, blocks=len(decision.cuts) + 1, seconds=seconds)
    costs, plan = PlanCosts.of(fixed, decision.cuts), tuple((k, 0) for k in range(len(decision.cuts)))
    limits = problem.limits.given()
    values = {measure: costs.value(measure, plan) for measure in limits}
    exceeded = [
        f"{measure}={amount(measure, limit)}, but it needs {amount(measure, values[measure])} {MEASURES[measure]}"
        for measure, limit in limits.items()
        if values[measure] > limit
    ]
    if exceeded:
        raise error(
            f"the plan with {_described(decision)} exceeds the budget: {'; '.join(exceeded)}. Raise the limits, or "
            "leave the choice to a search with the same budget=."
        )
    provenance = {**decision.provenance, "budget": limits, "plan_costs": values}
    measured = seconds if "block_seconds" in limits else decision.block_seconds
    return replace(decision, provenance=provenance, block_seconds=measured)


def _described(decision: Decision) -> str:
    if not decision.cuts:
        return "no cut"
    names = [repr(head_name(head)) if head is not None else "none" for head in decision.heads]
    return f"cuts {', '.join(map(repr, decision.cuts))}, heads {', '.join(names)}"
