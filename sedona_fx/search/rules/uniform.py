"""Uniform cuts, the baseline of SEDONA's paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.search.problem.plan_costs import allowed, heads_tried, plan_costs
from sedona_fx.search.problem.problem import Decision, Positions, Problem, Search
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule, head_by_rule


@dataclass(frozen=True)
class Uniform(Search):
    """Cut after base layer ``floor(-1 + jB/K)``, j = 1..K-1, of B (0-based; SEDONA, section 4.1).

    VGG-19, K = 4: 3, 7, 11. If the plan exceeds the problem's limits, the nearest plan within them is taken: that with
    the least sum of distances between its cuts and the uniform ones, in base layers. It has the heads of the rule if
    any plan with these keeps within the limits, else other heads too.

    Args:
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.

    Raises:
        SettingsError: `head` is neither of these.
    """

    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_head_rule(self.head, "Uniform")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
            CutError: the net has too few places to cut.
        """
        layers = uniform_layers(len(problem.places()) + 1, problem.blocks)
        return cut_after(problem, layers, self.head, "uniform")


def cut_after(problem: Problem, layers: Sequence[int], rule: HeadRule, name: str) -> Decision:
    """Cut after the given base layers, or, if that exceeds the problem's limits, as near to them as a plan within can.

    Args:
        problem: the net, its candidates and its limits.
        layers: K - 1 base layers, 0-based, ascending.
        rule: for the heads.
        name: of the search, for the provenance.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    places = problem.places()
    plan = tuple((places[k], head_by_rule(problem, places[k], rule)) for k in layers)
    if allowed(problem, plan):
        return problem.decision(plan, {"search": name, "head": rule})
    nearest_plan, distance = nearest(problem, layers, rule)
    moved = {f"{name}_cuts": [cut for cut, _ in plan], "distance": distance}
    return plan_costs(problem).decision(nearest_plan, {"search": name, "moved_for_budget": moved})


def nearest(problem: Problem, layers: Sequence[int], rule: HeadRule) -> tuple[Positions, int]:
    """Return the plan within the problem's limits whose cuts are nearest to `layers`, and the sum of the distances.

    It has the heads of the rule if any plan with these keeps within the limits. Of several nearest plans, the one with
    the least sum of head indices is taken, then the one with the earliest cuts.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    costs = plan_costs(problem)
    fits = heads_tried(problem, [head_by_rule(problem, place, rule) for place in problem.places()])
    head_counts = [len(row) for row in costs.heads["head_flops"]]
    step = 1 + len(layers) * max(head_counts, default=1)  # one base layer counts more than any choice of heads
    head_indices = [list(range(count)) for count in head_counts]
    distances = [[step * abs(place - layer) for place in range(len(head_counts))] for layer in layers]
    (best,) = costs.best(head_indices, 1, fits=fits, cut_scores=distances)
    return best.plan, sum(abs(place - layer) for (place, _), layer in zip(best.plan, layers, strict=True))


def uniform_layers(base_layers: int, blocks: int) -> list[int]:
    """Return the 0-based base layers after which a uniform plan cuts, ``floor(-1 + jB/K)`` for j = 1..K-1.

    Args:
        base_layers: B, the number of base layers.
        blocks: K.
    """
    return [j * base_layers // blocks - 1 for j in range(1, blocks)]
