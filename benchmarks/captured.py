"""The problem that ``decouple`` hands to a search, for whoever works on its parts."""

from __future__ import annotations

from typing import Any

from torch import nn

import sedona_fx
from sedona_fx.search import Decision, Problem, Search


class Capture(Search):
    """A search that keeps its problem, and cuts at the first places.

    Args:
        needs_data: whether it reads data, which then has to be several batches.
    """

    problem: Problem

    def __init__(self, *, needs_data: bool = True) -> None:
        self.needs_data = needs_data  # type: ignore[misc]

    def decide(self, problem: Problem) -> Decision:
        """Keep the problem."""
        self.problem = problem
        places = problem.places()[: problem.blocks - 1]
        return Decision(places, [next(iter(problem.candidates[place]), None) for place in places])


def captured(model: nn.Module, data: Any, *, needs_data: bool = True, **options: Any) -> Problem:
    """Return the problem of ``decouple(model, data, **options)``."""
    capture = Capture(needs_data=needs_data)
    sedona_fx.decouple(model, data, search=capture, **{"progress": False, **options})
    return capture.problem
