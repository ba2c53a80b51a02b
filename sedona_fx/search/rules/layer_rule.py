"""Rules that name the base layers to cut after; a budget moves the cuts as little as it must."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from sedona_fx.search.problem.plan_costs import allowed, heads_tried, plan_costs
from sedona_fx.search.problem.problem import Decision, Positions, Problem, Search
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule, head_by_rule


@dataclass(frozen=True)
class LayerRule(Search):
    """Base of the rules that decide by the number of base layers alone.

    If the plan exceeds the limits, the nearest plan within them is taken: that with the least sum of distances
    between its cuts and those of the rule, in base layers. It has the heads of the rule if any plan with these keeps
    within the limits, else other heads too.

    Args:
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.

    Raises:
        SettingsError: `head` is neither of these.
    """

    head: HeadRule = "first"

    def __post_init__(self) -> None:
        check_head_rule(self.head, type(self).__name__)

    @abstractmethod
    def layers(self, count: int, blocks: int) -> Sequence[int]:
        """Return the base layers to cut after: K - 1 of them, 0-based, ascending.

        Args:
            count: B, the number of base layers; a cut may stand after each but the last.
            blocks: K.
        """

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
            CutError: the net has too few places to cut.
        """
        name, places = type(self).__name__.lower(), problem.places()
        layers = self.layers(len(places) + 1, problem.blocks)
        plan = tuple((places[k], head_by_rule(problem, places[k], self.head)) for k in layers)
        if allowed(problem, plan):
            return problem.decision(plan, {"search": name, "head": self.head})
        nearest_plan, distance = nearest(problem, layers, self.head)
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
