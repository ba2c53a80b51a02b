"""Uniform cuts: SEDONA's baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.search.problem.plan_costs import allowed, heads_tried, plan_costs
from sedona_fx.search.problem.problem import Decision, Positions, Problem, Search
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule, head_by_rule


@dataclass(frozen=True)
class Uniform(Search):
    """Cut after base layer ``floor(-1 + jB/K)``, j = 1..K-1 (0-based; SEDONA, section 4.1). VGG-19, K = 4: 3, 7, 11.

    Where that exceeds the problem's limits, the nearest plan that does not is taken: the sum of the distances, in base
    layers, is least. Other heads are then tried only if no plan with these will do.

    Args:
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.
    """

    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_head_rule(self.head, "Uniform")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
        """
        layers = uniform_layers(len(problem.places()) + 1, problem.blocks)
        return cut_behind(problem, layers, self.head, "uniform")


def cut_behind(problem: Problem, layers: Sequence[int], rule: HeadRule, name: str) -> Decision:
    """Cut behind some base layers; where that exceeds the problem's limits, as near to them as a plan within does.

    Args:
        problem: the net, its candidates and its limits.
        layers: K-1 of them, 0-based, ascending.
        rule: for the heads.
        name: of the search.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    places = problem.places()
    plan = tuple((places[k], head_by_rule(problem, places[k], rule)) for k in layers)
    if allowed(problem, plan):
        return problem.decision(plan, {"search": name, "head": rule})
    moved, distance = nearest(problem, layers, rule)
    about = {f"{name}_cuts": [cut for cut, _ in plan], "distance": distance}
    return plan_costs(problem).decision(moved, {"search": name, "moved_for_budget": about})


def nearest(problem: Problem, layers: Sequence[int], rule: HeadRule) -> tuple[Positions, int]:
    """Return the plan within the problem's limits whose cuts are nearest to `layers`, and the sum of the distances.

    Heads are those of the rule if some plan with these will do. Of equally near plans the one with the earlier heads is
    taken, then the one with the earlier cuts.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    fits = heads_tried(problem, [head_by_rule(problem, place, rule) for place in problem.places()])
    kinds = [len(row) for row in plan_costs(problem).heads["head_flops"]]
    step = 1 + len(layers) * max(kinds, default=1)  # one base layer outweighs any choice of heads
    heads = [list(range(count)) for count in kinds]
    ranks = [[step * abs(k - layer) for k in range(len(kinds))] for layer in layers]
    (best,) = plan_costs(problem).best(heads, 1, fits, ranks)
    return best.plan, sum(abs(k - layer) for (k, _), layer in zip(best.plan, layers, strict=True))


def uniform_layers(base_layers: int, blocks: int) -> list[int]:
    """Return the 0-based base layers behind which a uniform plan of `blocks` blocks cuts."""
    return [j * base_layers // blocks - 1 for j in range(1, blocks)]
