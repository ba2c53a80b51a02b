"""Plans to try: all there are, or those of the rules and a random sample of the others; all within the budget."""

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

_MOST_LISTED = 10_000  # sets of cuts, up to which all plans are gone through
_DRAWS_PER_PLAN = 20


def proposals(problem: Problem, count: int) -> list[Choice]:
    """Return up to `count` different plans within the problem's limits.

    If there are no more than `count`, all are returned. Otherwise uniform, balanced and latest cuts, with the first and
    with the largest heads, are among them, and the rest is drawn at random, every plan with the same probability. Where
    so few plans keep within the limits that draws rarely hit one, the rest are the best plans for random scores.

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
        plans = map(at_places, every_plan(kinds, cuts))
        within = list(itertools.islice((plan for plan in plans if allowed(problem, plan)), count + 1))
        if len(within) <= count and within:
            return within
    by_rule = [
        problem.choice(rule(head=head).decide(problem))
        for rule in (Uniform, Balanced, Latest)
        for head in ("first", "largest")
    ]
    proposed = dict.fromkeys(list(dict.fromkeys(by_rule))[:count])  # an ordered set
    draws = random.Random(problem.seed)
    for _ in range(_DRAWS_PER_PLAN * count):
        if len(proposed) == count:
            return list(proposed)
        (drawn,) = sample_plans(kinds, cuts, 1, draws, every=False)
        plan = at_places(drawn)
        if allowed(problem, plan):
            proposed[plan] = None
    for _ in range(_DRAWS_PER_PLAN):
        scores = [[draws.random() for _ in range(heads)] for heads in kinds]
        for plan in best_plans(problem, scores, count):
            if len(proposed) < count:
                proposed[plan] = None
    return list(proposed)
