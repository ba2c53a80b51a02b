"""Balanced cuts: the largest block is as small as it can be, exactly."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sedona_fx.errors import SettingsError
from sedona_fx.ir.cost import stretch_costs
from sedona_fx.search.problem.dynamic_program import Ranked
from sedona_fx.search.problem.plan_costs import allowed, heads_tried, plan_costs
from sedona_fx.search.problem.problem import Decision, Positions, Problem, Search, candidate_cost
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule, head_by_rule


@dataclass(frozen=True)
class Balanced(Search):
    """Minimise the largest cost of a block, its head included, over all choices of cuts.

    Where that exceeds the problem's limits, the largest cost is the least among the plans that do not. Other heads are
    then tried only if no plan with these will do.

    Args:
        by: ``"flops"`` balances time on many devices, ``"activation_bytes"`` memory on one.
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.
    """

    by: Literal["flops", "activation_bytes"] = "flops"
    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.by not in ("flops", "activation_bytes"):
            raise SettingsError(f"Balanced(by={self.by!r}): either 'flops' or 'activation_bytes'")
        check_head_rule(self.head, "Balanced")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
        """
        places = problem.places()
        nodes = [problem.node(name) for name in places]
        stretches, shared = stretch_costs(problem.train, nodes)
        kinds = [head_by_rule(problem, name, self.head) for name in places]
        heads = [
            getattr(candidate_cost(problem, name, node, kind), self.by)
            for name, node, kind in zip(places, nodes, kinds, strict=True)
        ]
        costs = [getattr(cost, self.by) for cost in stretches]
        overlap = shared if self.by == "activation_bytes" else [0] * len(shared)
        chosen, largest = balance(costs, overlap, heads, problem.blocks)
        cuts = [places[k] for k in chosen]
        provenance = {"search": "balanced", "by": self.by, "largest_block": largest}
        plan = tuple((places[k], kinds[k]) for k in chosen)
        if allowed(problem, plan):
            return problem.decision(plan, {**provenance, "head": self.head})
        measure = "block_flops" if self.by == "flops" else self.by
        moved = balance_within(problem, measure, kinds)
        provenance["largest_block"] = int(plan_costs(problem).value(measure, moved))
        return plan_costs(problem).decision(moved, {**provenance, "balanced_cuts": cuts})


def balance_within(problem: Problem, measure: str, preferred: Sequence[int]) -> Positions:
    """Return the plan within the problem's limits whose largest block costs least; ties go to the earlier cuts.

    The least cost is found by bisection: whether any plan has no larger block is a question to the programme.

    Args:
        problem: the net, its candidates and its limits.
        measure: the cost of a block, one of the limits' names.
        preferred: the number of the head of every place that is taken if some plan of such heads will do.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs, fits = plan_costs(problem), heads_tried(problem, preferred)
    blocks = costs.blocks(measure)
    flat = [[0.0] * len(row) for row in costs.heads["head_flops"]]
    levels = np.unique(blocks[fits])

    def plan(level: float) -> list[Ranked]:
        return costs.best(flat, 1, fits & (blocks <= level))

    least = bisect.bisect_left(levels, 1, key=lambda level: len(plan(level)))
    return plan(levels[least])[0].plan


def balance(costs: Sequence[int], shared: Sequence[int], heads: Sequence[int], blocks: int) -> tuple[list[int], int]:
    """Cut a chain of n+1 stretches into `blocks` runs so that the largest cost of a run is least.

    A run from stretch a to stretch b costs ``sum(costs[a..b]) - sum(shared[a..b-1]) + heads[b]`` (no head behind the
    last). Exact dynamic programme, O(n^2 blocks); ties go to the earlier cut.

    Args:
        costs: of the n+1 stretches.
        shared: counted twice by neighbouring stretches, n numbers.
        heads: cost of a head at each of the n cut points.
        blocks: number of runs, at most n+1.

    Returns:
        The stretches behind which to cut, and the largest cost.
    """
    n = len(costs) - 1
    sums = np.concatenate([[0], np.cumsum(costs)])
    overlaps = np.concatenate([[0], np.cumsum([*shared, 0])])
    behind = np.array([*heads, 0])

    def run(a: Any, b: Any) -> Any:
        return sums[b + 1] - sums[a] - (overlaps[b] - overlaps[a]) + behind[b]

    # best[j][b]: least largest cost of j runs that end behind stretch b.
    best = [run(0, np.arange(n + 1))]
    came = [np.full(n + 1, -1)]
    for j in range(1, blocks):
        row, source = np.full(n + 1, np.iinfo(np.int64).max), np.full(n + 1, -1)
        for b in range(j, n + 1):
            starts = np.arange(j - 1, b)
            values = np.maximum(best[j - 1][j - 1 : b], run(starts + 1, b))
            first = int(values.argmin())
            row[b], source[b] = values[first], starts[first]
        best.append(row)
        came.append(source)
    chosen, at = [], n
    for j in range(blocks - 1, 0, -1):
        at = int(came[j][at])
        chosen.append(at)
    return chosen[::-1], int(best[blocks - 1][n])
