"""How cuts and heads are chosen: by gradient (``Guided``, ``Sedona``), by trial (``Rollout``), or by rule.

Files

problem/         What a search is given, what plans cost, and the exact search over all plans
relaxed/         The mathematics of the relaxed net: its training step and the gradients through it
rules/           Searches that choose cuts by rule: balanced, uniform, latest
sedona/          SEDONA's search (Pyeon et al., ICLR 2021): bilevel optimisation of cuts and heads
session/         What a long search needs: data streams, a journal to resume from, progress, and timing
trials/          Judging plans: by training them, or by comparing their gradients with those of backpropagation
best_of          One search with several seeds: how far the plans differ, and the plan that is best on data that no
                 run has seen
guided           The default search: gradients prune the candidate cuts and heads, rollouts decide among the best
                 plans that are left
guided_run       One guided search: its parts in their order, saved between any two batches
                 (:mod:`~sedona_fx.search.guided`)
guided_settings  Settings of the guided search, checked on construction
rollout          Rollout: train candidate plans for a short while, and keep the one that does best
trial_settings   Settings that searches by trial have in common, checked on construction
"""

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
