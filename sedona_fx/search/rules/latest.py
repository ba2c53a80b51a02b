"""Latest cuts: a control, with one deep first block and the shortest blocks there are behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.search.problem.problem import Decision, Problem, Search
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule
from sedona_fx.search.rules.uniform import cut_behind


@dataclass(frozen=True)
class Latest(Search):
    """Cut behind the last K-1 base layers but the final one. VGG-19, K = 4: 12, 13, 14 (0-based).

    It is what SEDONA's released plans come near to (VGG-19: 5, 12, 13), for no search at all. Where it exceeds the
    problem's limits, the nearest plan that does not is taken, with these heads if such a one will do.

    Args:
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.
    """

    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_head_rule(self.head, "Latest")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
        """
        count = len(problem.places())
        return cut_behind(problem, range(count - (problem.blocks - 1), count), self.head, "latest")
