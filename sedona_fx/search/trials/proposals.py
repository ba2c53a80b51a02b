"""Plans to try: all there are, or those by rule and a random sample of the others; all within the budget."""

from __future__ import annotations

import itertools
import math
import random

from sedona_fx.search.problem.plan_costs import allowed, best_plans
from sedona_fx.search.problem.problem import Choice, Positions, Problem
from sedona_fx.search.problem.sampling import every_plan, sample_plans
from sedona_fx.search.rules.balanced import Balanced
from sedona_fx.search.rules.latest import Latest
from sedona_fx.search.rules.uniform import Uniform

_MOST_LISTED = 10_000
_DRAWS_A_PLAN = 20


def proposals(problem: Problem, count: int) -> list[Choice]:
    """Return up to `count` different plans within the problem's limits.

    Where there are more, uniform, balanced and latest cuts with the first and with the largest heads are among them;
    the rest is drawn at random, each plan equally likely. Where hardly any plan keeps within the limits, the rest are
    the best ones for random scores.

    Raises:
        BudgetError: no plan keeps within the limits.
        CutError: there are no heads.
    """
    problem.require_heads("search='rollout'")
    places, cuts = problem.places(), problem.blocks - 1
    kinds = [len(problem.candidates[place]) for place in places]

    def at_places(plan: Positions) -> Choice:
        return tuple((places[k], head) for k, head in plan)

    if math.comb(len(places), cuts) <= _MOST_LISTED:
        ways = map(at_places, every_plan(kinds, cuts))
        every = list(itertools.islice((plan for plan in ways if allowed(problem, plan)), count + 1))
        if len(every) <= count and every:
            return every
    found: dict[Choice, None] = {}
    for rule in (Uniform, Balanced, Latest):
        for head in ("first", "largest"):
            found[problem.choice(rule(head=head).decide(problem))] = None
    found = dict.fromkeys(list(found)[:count])
    draws = random.Random(problem.seed)
    for _ in range(_DRAWS_A_PLAN * count):
        if len(found) == count:
            return list(found)
        (drawn,) = sample_plans(kinds, cuts, 1, draws, every=False)
        plan = at_places(drawn)
        if allowed(problem, plan):
            found[plan] = None
    for _ in range(_DRAWS_A_PLAN):
        scores = [[draws.random() for _ in range(kind)] for kind in kinds]
        for plan in best_plans(problem, scores, count):
            if len(found) < count:
                found[plan] = None
    return list(found)
