"""The rules by which a cut gets one of its candidate heads: the first one, or the largest."""

from __future__ import annotations

from typing import Literal, get_args

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.problem import Problem, candidate_cost

HeadRule = Literal["first", "largest"]


def check_head_rule(head: str, who: str) -> None:
    """Check that a setting is a rule for heads.

    Args:
        head: the setting.
        who: name of the search's class, for the message.

    Raises:
        SettingsError: there is no such rule.
    """
    if head not in get_args(HeadRule):
        raise SettingsError(f"{who}(head={head!r}): either 'first' or 'largest'")


def head_by_rule(problem: Problem, cut: str, rule: HeadRule) -> int:
    """Return the index of a cut's head among its candidates: 0, or that of the head with most FLOPs.

    Of several largest heads it is the first; without candidates it is 0. For searches that need no data a cut has a
    single candidate, unless the user gives more.
    """
    if rule == "first":
        return 0
    node = problem.node(cut)
    flops = [candidate_cost(problem, cut, node, index).flops for index in range(len(problem.candidates[cut]))]
    return flops.index(max(flops)) if flops else 0
