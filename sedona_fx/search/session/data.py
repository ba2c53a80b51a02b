"""The data of a problem as streams: endless, seeded, and with a position that can be written down."""

from __future__ import annotations

from sedona_fx.search.problem.problem import Problem, SearchData
from sedona_fx.search.session.batches import NamedBatches
from sedona_fx.search.session.stream import Stream


def training_stream(problem: Problem, data: SearchData) -> Stream:
    """Return the training batches of a problem, on its device, seeded by its seed."""
    return Stream(NamedBatches(data.train, problem.train, problem.device), "training", problem.seed)


def validation_stream(problem: Problem, data: SearchData) -> Stream:
    """Return the validation batches of a problem, on its device, seeded by its seed."""
    return Stream(NamedBatches(data.val, problem.train, problem.device), "validation", problem.seed)
