"""Balanced cuts: the largest block costs as little as it can, exactly."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sedona_fx.errors import SettingsError
from sedona_fx.ir.cost import stretch_costs
from sedona_fx.ir.stretches.shares import Measure
from sedona_fx.search.problem.dynamic_program import RankedPlan
from sedona_fx.search.problem.plan_costs import allowed, heads_tried, plan_costs
from sedona_fx.search.problem.problem import Decision, Positions, Problem, Search, candidate_cost
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule, head_by_rule


@dataclass(frozen=True)
class Balanced(Search):
    """Minimise the largest cost of a block, its head included, over all choices of cuts.

    Frozen parameters at the beginning of a block run without a graph: they keep no bytes for backward, and their FLOPs
    count a third.

    If that plan exceeds the problem's limits, the largest cost is the least among the plans within them. These have the
    heads of the rule if any plan with these keeps within the limits, else other heads too.

    Args:
        by: ``"flops"`` balances time on several devices, ``"activation_bytes"`` memory on one.
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.

    Raises:
        SettingsError: `by` or `head` has another value.
    """

    by: Measure = "flops"
    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.by not in ("flops", "activation_bytes"):
            raise SettingsError(f"Balanced(by={self.by!r}): either 'flops' or 'activation_bytes'")
        check_head_rule(self.head, "Balanced")

    @property
    def balances(self) -> Measure:
        """What is balanced."""
        return self.by

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
            CutError: the net has too few places to cut.
        """
        places = problem.places()
        head_indices = [head_by_rule(problem, name, self.head) for name in places]
        measure, unit = str(self.by if self.by != "flops" else "block_flops"), 1
        if all(parameter.requires_grad for parameter in problem.train.parameters()):
            chosen, largest = self._of_trained(problem, places, head_indices)
        else:
            measure, unit = ("step_flops", 3) if self.by == "flops" else (measure, 1)
            chosen, largest = _of_measured(problem, measure, head_indices)
        provenance = {"search": "balanced", "by": self.by, "largest_block": largest // unit}
        plan = tuple((places[k], head_indices[k]) for k in chosen)
        if allowed(problem, plan):
            return problem.decision(plan, {**provenance, "head": self.head})
        within = balance_within(problem, measure, head_indices)
        provenance["largest_block"] = int(plan_costs(problem).value(measure, within)) // unit
        return plan_costs(problem).decision(within, {**provenance, "balanced_cuts": [places[k] for k in chosen]})

    def _of_trained(
        self, problem: Problem, places: Sequence[str], head_indices: Sequence[int]
    ) -> tuple[list[int], int]:
        """Return the places to cut at and the largest cost of a block, for a net without frozen parameters."""
        nodes = [problem.node(name) for name in places]
        stretches, shared_bytes = stretch_costs(problem.train, nodes)
        head_costs = [
            getattr(candidate_cost(problem, name, node, index), self.by)
            for name, node, index in zip(places, nodes, head_indices, strict=True)
        ]
        costs = [getattr(cost, self.by) for cost in stretches]
        shared = shared_bytes if self.by == "activation_bytes" else [0] * len(shared_bytes)
        return balance(costs, shared, head_costs, problem.blocks)


def _of_measured(problem: Problem, measure: str, head_indices: Sequence[int]) -> tuple[list[int], int]:
    """Return the places to cut at and the largest cost of a block, for a net with frozen parameters.

    What those cost depends on where their block begins: at its beginning they run without a graph.
    """
    costs = plan_costs(problem)
    runs, heads = costs.table(measure)
    block_costs = runs + np.array([*(row[m] for row, m in zip(heads, head_indices, strict=True)), 0], dtype=np.int64)
    return _balance(lambda a, b: block_costs[a, b], len(costs.places), problem.blocks)


def balance_within(problem: Problem, measure: str, preferred: Sequence[int]) -> Positions:
    """Return the plan within the problem's limits whose largest block costs least; ties go to the earlier cuts.

    The least cost is found by bisection over the costs of all blocks: the dynamic program says whether there is a plan
    without a larger block.

    Args:
        problem: the net, its candidates and its limits.
        measure: the cost of a block, one of the names of the limits.
        preferred: for each place the index of the head to take, if any plan with these heads keeps within the limits.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs, fits = plan_costs(problem), heads_tried(problem, preferred)
    block_costs = costs.blocks(measure)
    no_scores = [[0.0] * len(row) for row in costs.heads["head_flops"]]
    levels = np.unique(block_costs[fits])

    def plans(level: float) -> list[RankedPlan]:
        """Return a plan without a block that costs more, if there is one."""
        return costs.best(no_scores, 1, fits & (block_costs <= level))

    least = bisect.bisect_left(levels, 1, key=lambda level: len(plans(level)))
    return plans(levels[least])[0].plan


def balance(costs: Sequence[int], shared: Sequence[int], heads: Sequence[int], blocks: int) -> tuple[list[int], int]:
    """Cut a chain of n + 1 stretches into `blocks` runs so that the largest cost of a run is least, exactly.

    A run of the stretches a to b costs ``sum(costs[a..b]) - sum(shared[a..b-1]) + heads[b]``; the last run has no head.
    The dynamic program over (runs so far, last stretch) takes O(n^2 blocks); ties go to the earlier cut.

    Args:
        costs: of the n + 1 stretches.
        shared: n numbers: what stretches k and k + 1 both contain, and their run has only once.
        heads: n numbers: the cost of a head after each stretch but the last.
        blocks: number of runs, 1 to n + 1.

    Returns:
        The stretches after which to cut, and the largest cost of a run.
    """
    n = len(costs) - 1
    sums = np.concatenate([[0], np.cumsum(costs)])
    shared_sums = np.concatenate([[0], np.cumsum([*shared, 0])])
    head_costs = np.array([*heads, 0])

    def run_cost(a: Any, b: Any) -> Any:
        return sums[b + 1] - sums[a] - (shared_sums[b] - shared_sums[a]) + head_costs[b]

    return _balance(run_cost, n, blocks)


def _balance(run_cost: Callable[[Any, Any], Any], n: int, blocks: int) -> tuple[list[int], int]:
    """Do the work of :func:`balance`, given the cost of the runs of stretches a to b for arrays of indices."""
    # largest[j][b]: the least largest cost of j + 1 runs that end with stretch b; previous[j][b]: the end of run j.
    largest = [run_cost(0, np.arange(n + 1))]
    previous = [np.full(n + 1, -1)]
    for j in range(1, blocks):
        row, sources = np.full(n + 1, np.iinfo(np.int64).max), np.full(n + 1, -1)
        for b in range(j, n + 1):
            ends = np.arange(j - 1, b)
            values = np.maximum(largest[j - 1][j - 1 : b], run_cost(ends + 1, b))
            first = int(values.argmin())
            row[b], sources[b] = values[first], ends[first]
        largest.append(row)
        previous.append(sources)
    cuts, end = [], n
    for j in range(blocks - 1, 0, -1):
        end = int(previous[j][end])
        cuts.append(end)
    return cuts[::-1], int(largest[blocks - 1][n])
