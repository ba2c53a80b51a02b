"""How cuts and heads are chosen: by gradient (``Guided``, ``Sedona``), by trial (``Rollout``), or by rule."""

from sedona_fx.search.best_of import BestOf
from sedona_fx.search.guided import Guided
from sedona_fx.search.problem.limits import Limits
from sedona_fx.search.problem.plan_costs import allowed, best_plans
from sedona_fx.search.problem.problem import Decision, Problem, Search
from sedona_fx.search.rollout import Rollout
from sedona_fx.search.rules.balanced import Balanced, balance
from sedona_fx.search.rules.latest import Latest
from sedona_fx.search.rules.uniform import Uniform
from sedona_fx.search.sedona.decode import decode
from sedona_fx.search.sedona.sedona import Sedona

SEARCHES: dict[str, type[Search]] = {
    "guided": Guided,
    "sedona": Sedona,
    "rollout": Rollout,
    "balanced": Balanced,
    "uniform": Uniform,
    "latest": Latest,
}
"""What ``decouple(search=...)`` knows by name."""

__all__ = [
    "SEARCHES",
    "Balanced",
    "BestOf",
    "Decision",
    "Guided",
    "Latest",
    "Limits",
    "Problem",
    "Rollout",
    "Search",
    "Sedona",
    "Uniform",
    "allowed",
    "balance",
    "best_plans",
    "decode",
]
