"""How cuts and heads are chosen: ``Sedona`` by gradient, ``Rollout`` by trial, ``Balanced``, ``Uniform`` by rule."""

from sedona_fx.search.balanced import Balanced, balance
from sedona_fx.search.decode import decode
from sedona_fx.search.problem import Decision, Problem, Search
from sedona_fx.search.rollout import Rollout
from sedona_fx.search.sedona import Sedona
from sedona_fx.search.uniform import Uniform

SEARCHES: dict[str, type[Search]] = {
    "sedona": Sedona,
    "rollout": Rollout,
    "balanced": Balanced,
    "uniform": Uniform,
}
"""What ``decouple(search=...)`` knows by name."""

__all__ = ["SEARCHES", "Balanced", "Decision", "Problem", "Rollout", "Search", "Sedona", "Uniform", "balance", "decode"]
