"""Latest cuts: a control with one deep first block, followed by the shortest blocks possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.search.problem.problem import Decision, Problem, Search
from sedona_fx.search.rules.head_rule import HeadRule, check_head_rule
from sedona_fx.search.rules.uniform import cut_after


@dataclass(frozen=True)
class Latest(Search):
    """Cut after each of the K - 1 base layers before the final one. VGG-19, K = 4: 12, 13, 14 (0-based).

    SEDONA's released plans come near to this (VGG-19: 5, 12, 13); it costs no search at all. If the plan exceeds the
    problem's limits, the nearest plan within them is taken, with the heads of the rule if one with these will do.

    Args:
        head: each cut gets the ``"first"`` of its candidate heads, or the ``"largest"``, by FLOPs.

    Raises:
        SettingsError: `head` is neither of these.
    """

    head: HeadRule = "first"
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_head_rule(self.head, "Latest")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads.

        Raises:
            BudgetError: no plan keeps within the limits.
            CutError: the net has too few places to cut.
        """
        count = len(problem.places())
        return cut_after(problem, range(count - (problem.blocks - 1), count), self.head, "latest")
