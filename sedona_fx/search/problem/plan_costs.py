"""What plans cost, block by block, and which of them keep within the limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sedona_fx.errors import BudgetError, CutError, PlanError
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import info
from sedona_fx.search.problem.block_seconds import measure_seconds
from sedona_fx.search.problem.dynamic_program import Ranked, smallest_largest
from sedona_fx.search.problem.dynamic_program import best_plans as programme
from sedona_fx.search.problem.limits import MEASURES, Limits, amount
from sedona_fx.search.problem.problem import Choice, Decision, Positions, Problem, candidate_cost


@dataclass(frozen=True)
class PlanCosts:
    """Costs of all blocks that plans over some places can have; seconds only once they are asked for.

    Attributes:
        problem: the net, its candidate heads and the limits.
        places: the cut points to choose from, n of them.
        runs: by measure, (n + 1, n + 1): cost of the stretches a to b without a head.
        heads: by measure, for every place the cost of each of its heads (a single 0 where there are none).
    """

    problem: Problem
    places: tuple[str, ...]
    runs: dict[str, list[list[float]]]
    heads: dict[str, list[list[float]]]

    @classmethod
    def of(cls, problem: Problem, places: Sequence[str] | None = None) -> PlanCosts:
        """Count the blocks between the places; None: those of the problem.

        A block's bytes are those of the storages that its stretches keep, each counted once.
        """
        names = problem.places() if places is None else list(places)
        nodes = [problem.node(name) for name in names]
        blocks = block_of(problem.train.graph, nodes)
        flops, kept = [0] * (len(names) + 1), [dict[int, int]() for _ in range(len(names) + 1)]
        for node, block in blocks.items():
            flops[block] += info(node).flops
            kept[block].update(info(node).saved)
        costs = [
            [candidate_cost(problem, name, node, m) for m in range(max(1, len(problem.candidates[name])))]
            for name, node in zip(names, nodes, strict=True)
        ]
        by_flops: list[list[float]] = [[c.flops for c in row] for row in costs]
        return cls(
            problem,
            tuple(names),
            {"block_flops": _sums(flops), "activation_bytes": _unions(kept)},
            {
                "block_flops": by_flops,
                "head_flops": by_flops,
                "activation_bytes": [[c.activation_bytes for c in row] for row in costs],
            },
        )

    def table(self, measure: str) -> tuple[list[list[float]], list[list[float]]]:
        """Return the costs by `measure` of stretches a to b without a head, and of the heads of each place."""
        if measure not in self.runs:
            stretches, heads = self._seconds()
            self.runs[measure], self.heads[measure] = _sums(stretches), heads
        return self.runs[measure], self.heads[measure]

    def _seconds(self) -> tuple[list[float], list[list[float]]]:
        """Return the seconds of stretches and heads: as the problem knows them, or measured, and then known to it."""
        known = self.problem.seconds
        names = {place: [head_name(spec) for spec in self.problem.candidates[place]] for place in self.places}
        if not all(set(heads) <= known.get("heads", {}).get(place, {}).keys() for place, heads in names.items()):
            known.clear()
        if not known:
            known.update(measure_seconds(self.problem, self.places))
        heads = [[known["heads"][place][name] for name in names[place]] or [0.0] for place in self.places]
        edges = [-1, *(known["places"].index(place) for place in self.places), len(known["places"])]
        stretches = [math.fsum(known["stretches"][a + 1 : b + 1]) for a, b in itertools.pairwise(edges)]
        return stretches, heads

    def value(self, measure: str, plan: Positions) -> float:
        """Return what a plan costs: its largest block, or for ``head_flops`` its heads together."""
        if measure == "head_flops":
            return sum(self.heads[measure][b][m] for b, m in plan)
        runs, heads = self.table(measure)
        starts = [0, *(b + 1 for b, _ in plan)]
        with_heads = [runs[a][b] + heads[b][m] for a, (b, m) in zip(starts, plan, strict=False)]
        return max([*with_heads, runs[starts[-1]][len(self.places)]])

    def within(self, plan: Positions, limits: Limits) -> bool:
        """Whether a plan keeps within all limits."""
        return all(self.value(measure, plan) <= limit for measure, limit in limits.given().items())

    def blocks(self, measure: str) -> np.ndarray:
        """Return (n + 1, n + 1, most heads): the cost of the block of stretches a to b with head m (infinite: none)."""
        runs, heads = self.table(measure)
        most = max((len(row) for row in heads), default=1)
        behind = np.full((len(heads) + 1, most), np.inf)
        for place, row in enumerate(heads):
            behind[place, : len(row)] = row
        behind[-1, 0] = 0.0
        costs: np.ndarray = np.asarray(runs)[:, :, None] + behind[None]
        return costs

    def fits(self, limits: Limits | None) -> np.ndarray:
        """Return which of these blocks may be: those that exist, within the limits on a block."""
        counted = self.blocks("block_flops")
        allowed = np.isfinite(counted) & np.triu(np.ones(counted.shape[:2], dtype=bool))[:, :, None]
        for measure, limit in (limits.given() if limits is not None else {}).items():
            if measure != "head_flops":
                allowed &= self.blocks(measure) <= limit
        return allowed

    def best(
        self,
        scores: Sequence[Sequence[float]],
        count: int,
        fits: np.ndarray | None = None,
        ranks: Sequence[Sequence[float]] | None = None,
    ) -> list[Ranked]:
        """Return the best plans within the problem's limits (and among the blocks of `fits`); lower is better."""
        limits = self.problem.limits
        weights = [[int(w) for w in row] for row in self.heads["head_flops"]]
        return programme(
            scores,
            self.problem.blocks,
            count=count,
            fits=self.fits(limits) if fits is None else fits,
            ranks=ranks,
            weights=weights,
            limit=limits.head_flops if limits is not None else None,
        )

    def least(self, measure: str) -> tuple[float, Positions]:
        """Return the least that a plan can cost by one measure, and such a plan."""
        if measure == "head_flops":
            (found,) = programme(self.heads[measure], self.problem.blocks, count=1)
            return found.score, found.plan
        answer = smallest_largest(self.blocks(measure), self.fits(None), self.problem.blocks)
        assert answer is not None  # places() sees to it that there are enough
        return answer

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
    """Whether a plan keeps within the problem's limits: tens of microseconds, after the first call."""
    costs, limits = plan_costs(problem), problem.limits
    return limits is None or costs.within(tuple((problem.position(place), head) for place, head in plan), limits)


def best_plans(problem: Problem, scores: Sequence[Sequence[float]], count: int = 10) -> list[Choice]:
    """Return the best plans within the problem's limits for additive scores, exactly, best first.

    Args:
        problem: the net, its candidates and its limits.
        scores: ``scores[k][m]`` of head m behind place k of ``problem.places()``; lower is better.
        count: how many; fewer come back if there are no more.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs = plan_costs(problem)
    found = costs.best(scores, count)
    if not found:
        raise no_plan(costs)
    return [tuple((costs.places[b], m) for b, m in ranked.plan) for ranked in found]


def heads_tried(problem: Problem, preferred: Sequence[int]) -> np.ndarray:
    """Return the blocks that a rule may choose among: with the heads that it prefers, or, if no plan with those keeps
    within the limits, with any.

    Args:
        problem: the net, its candidates and its limits.
        preferred: the number of the preferred head of every place.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs = plan_costs(problem)
    every = costs.fits(problem.limits)
    wanted = np.zeros(every.shape[1:], dtype=bool)
    wanted[np.arange(len(preferred) + 1), [*preferred, 0]] = True
    flat = [[0.0] * len(row) for row in costs.heads["head_flops"]]
    for fits in (every & wanted, every):
        if costs.best(flat, 1, fits):
            return fits
    raise no_plan(costs)


def no_plan(costs: PlanCosts) -> BudgetError:
    """Return the error for limits that no plan meets: the least possible value of each, and a plan that has it."""
    problem = costs.problem
    assert problem.limits is not None
    blocks, parts, apart = problem.blocks, [], True
    for measure, limit in problem.limits.given().items():
        least, plan = costs.least(measure)
        decision = costs.decision(plan, {})
        best = f"{amount(measure, least)} ({_described(decision)})"
        if least > limit:
            apart = False
            parts.append(f"{measure}={amount(measure, limit)}: no plan with {blocks} blocks needs less than {best}")
        else:
            parts.append(f"{measure}={amount(measure, limit)}: can be met alone, down to {best}")
    together = " Each limit can be met alone, but no plan meets all of them together." if apart else ""
    return BudgetError(
        f"no plan keeps within the budget. {'; '.join(parts)}.{together} Raise the limits, ask for another number of "
        "blocks, offer smaller heads with heads=[...], or take smaller batches."
    )


def check_possible(problem: Problem) -> None:
    """See that some plan keeps within the problem's limits, before anything is searched.

    Raises:
        BudgetError: none does.
    """
    if problem.limits is not None:
        heads_tried(problem, [0] * len(plan_costs(problem).places))


def within_budget(problem: Problem, decision: Decision, error: type[CutError | PlanError]) -> Decision:
    """Return a decision that keeps within the problem's limits, with what it costs in its provenance.

    Raises:
        CutError, PlanError: it does not, with the numbers; as `error` says.
    """
    if problem.limits is None:
        return decision
    own = {cut: [h] if h is not None else [] for cut, h in zip(decision.cuts, decision.heads, strict=True)}
    seconds = dict(problem.seconds)
    alone = replace(problem, candidates=own, blocks=len(decision.cuts) + 1, seconds=seconds)
    costs, plan = PlanCosts.of(alone, decision.cuts), tuple((k, 0) for k in range(len(decision.cuts)))
    limits = problem.limits.given()
    values = {measure: costs.value(measure, plan) for measure in limits}
    over = [
        f"{measure}={amount(measure, limit)}, but it needs {amount(measure, values[measure])} {MEASURES[measure]}"
        for measure, limit in limits.items()
        if values[measure] > limit
    ]
    if over:
        raise error(
            f"the plan with {_described(decision)} exceeds the budget: {'; '.join(over)}. Raise the limits, or leave "
            "the choice to a search with the same budget=."
        )
    record = {"budget": limits, "plan_costs": values}
    measured = seconds if "block_seconds" in limits else decision.block_seconds
    return replace(decision, provenance={**decision.provenance, **record}, block_seconds=measured)


def _described(decision: Decision) -> str:
    if not decision.cuts:
        return "no cut"
    names = [repr(head_name(head)) if head is not None else "none" for head in decision.heads]
    return f"cuts {', '.join(map(repr, decision.cuts))}, heads {', '.join(names)}"


def _sums(costs: Sequence[float]) -> list[list[float]]:
    """Return what the stretches a to b cost together, for all a and b; 0 where there are none.

    Seconds are rounded once, so that a block is the same sum whatever the places that it is put together from.
    """
    n, add = len(costs), sum if all(isinstance(cost, int) for cost in costs) else math.fsum
    return [[0.0] * a + [add(costs[a : b + 1]) for b in range(a, n)] for a in range(n)]


def _unions(kept: Sequence[Mapping[int, int]]) -> list[list[float]]:
    """Return the bytes of the storages that the stretches a to b keep, for all a and b; 0 where there are none."""
    rows = []
    for a in range(len(kept)):
        row, seen, total = [0.0] * a, set[int](), 0
        for stretch in kept[a:]:
            total += sum(size for storage, size in stretch.items() if storage not in seen)
            seen.update(stretch)
            row.append(total)
        rows.append(row)
    return rows
