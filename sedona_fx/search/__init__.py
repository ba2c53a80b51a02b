"""How cuts and heads are chosen: by gradient (``Guided``, ``Sedona``), by trial (``Rollout``), or by rule."""

from sedona_fx.search.balanced import Balanced, balance
from sedona_fx.search.decode import decode
from sedona_fx.search.guided import Guided
from sedona_fx.search.latest import Latest
from sedona_fx.search.limits import Limits
from sedona_fx.search.plan_costs import allowed, best_plans
from sedona_fx.search.problem import Decision, Problem, Search
from sedona_fx.search.rollout import Rollout
from sedona_fx.search.sedona import Sedona
from sedona_fx.search.seeds import BestOf
from sedona_fx.search.uniform import Uniform

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
