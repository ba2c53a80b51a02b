"""Which of a cut's candidate heads a rule takes: the first one, or the largest."""

from __future__ import annotations

from typing import Literal, get_args

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.problem import Problem, candidate_cost

HeadRule = Literal["first", "largest"]


def check_head_rule(head: str, who: str) -> None:
    """See that a rule for heads is one.

    Raises:
        SettingsError: it is not.
    """
    if head not in get_args(HeadRule):
        raise SettingsError(f"{who}(head={head!r}): either 'first' or 'largest'")


def head_by_rule(problem: Problem, cut: str, rule: HeadRule) -> int:
    """Return the number of a cut's head among its candidates: 0, or that of the one with most FLOPs.

    Of equally large ones the first. Without a search a cut has a single candidate, unless the user gives more.
    """
    if rule == "first":
        return 0
    node = problem.node(cut)
    flops = [candidate_cost(problem, cut, node, m).flops for m in range(len(problem.candidates[cut]))]
    return flops.index(max(flops)) if flops else 0
