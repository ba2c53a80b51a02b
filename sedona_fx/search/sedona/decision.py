"""From a search's result to the :class:`~sedona_fx.search.problem.problem.Decision` that ``decouple`` compiles.

Cuts and heads come from decoding by perturbation where the result has it, otherwise from the learned logits
(:mod:`~sedona_fx.search.sedona.decode`). The provenance says what was learned and what is a tie.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sedona_fx.heads.registry import head_name
from sedona_fx.plan import Plan
from sedona_fx.search.problem.problem import Decision, Problem
from sedona_fx.search.sedona.certainty import TOLERANCE, certainty
from sedona_fx.search.sedona.decode import decode_within
from sedona_fx.search.sedona.result import SedonaResult
from sedona_fx.search.sedona.settings import SedonaSettings

log = logging.getLogger(__name__)


def decision_of(settings: SedonaSettings, problem: Problem, places: Sequence[str], result: SedonaResult) -> Decision:
    """Decide on cuts and heads within the problem's limits, and record in the provenance how that came about.

    Args:
        settings: of the search.
        problem: the net.
        places: the cut points that alpha and beta are about, B-1 of them.
        result: of the search.

    Raises:
        BudgetError: no plan keeps within the problem's limits.
    """
    decoding, candidates = result.decoding, candidate_names(problem, places)
    if decoding is None:
        cuts, heads = decode_within(problem, result.alpha, result.beta)
    else:
        cuts, heads = decoding.cuts, decoding.heads
    provenance = {
        "search": "sedona",
        "interrupted": result.interrupted,
        "unroll": settings.unroll,
        "cost": result.cost,
        "places": list(places),
        "candidates": candidates,
        "alpha": result.alpha.tolist(),
        "beta": [logits.tolist() for logits in result.beta],
        "trajectory": result.trajectory,
        "failures": result.failures,
        **_certainty_record(places, candidates, result, cuts),
        **({} if decoding is None else {"decoding": decoding.record(places, candidates)}),
    }
    return problem.decision([(places[cut], head) for cut, head in zip(cuts, heads, strict=True)], provenance)


def plan_so_far(settings: SedonaSettings, problem: Problem, places: Sequence[str], result: SedonaResult) -> Plan:
    """Return what a search had learned when it could not go on, as a plan."""
    decision = decision_of(settings, problem, places, result)
    heads = tuple(head_name(spec) if spec is not None else None for spec in decision.heads)
    return Plan(cuts=tuple(decision.cuts), heads=heads, provenance=decision.provenance)


def candidate_names(problem: Problem, places: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the names of the candidate heads by place."""
    return {name: [head_name(spec) for spec in problem.candidates[name]] for name in places}


def _certainty_record(
    places: Sequence[str], candidates: dict[str, list[str | None]], result: SedonaResult, cuts: Sequence[int]
) -> dict[str, Any]:
    """Return as JSON, and log, which places were learned and where the decision is a tie."""
    judged = certainty(result.alpha, result.beta, result.farthest, cuts)
    learned = [places[k] for k in judged.learned]
    cut_ties = [places[k] for k in judged.cut_ties]
    head_ties = {places[k]: [candidates[places[k]][m] for m in heads] for k, heads in judged.head_ties.items()}
    log.info(
        "SEDONA learned %d of %d p_isolate; the others stayed at one half. Ties between cuts: %s; between heads: %s.",
        len(learned),
        len(places),
        ", ".join(cut_ties) or "none",
        "; ".join(f"{place}: {', '.join(map(str, heads))}" for place, heads in head_ties.items()) or "none",
    )
    return {"learned": learned, "ties": {"cuts": cut_ties, "heads": head_ties}, "tolerance": TOLERANCE}
