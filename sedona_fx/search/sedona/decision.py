"""From what SEDONA learned to a decision, with everything that a person may want to know about it."""

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
    """Decode what was learned, within the problem's limits, and say in the provenance how it came about."""
    decoding = result.decoding
    if decoding is None:
        cuts, heads = decode_within(problem, result.alpha, result.beta)
    else:
        cuts, heads = decoding.cuts, decoding.heads
    names = [places[k] for k in cuts]
    provenance = {
        "search": "sedona",
        "interrupted": result.interrupted,
        "unroll": settings.unroll,
        "cost": result.cost,
        "places": list(places),
        "candidates": candidate_names(problem, places),
        "alpha": result.alpha.tolist(),
        "beta": [logits.tolist() for logits in result.beta],
        "trajectory": result.trajectory,
        "failures": result.failures,
        **_certain(problem, places, result, cuts),
        **({} if decoding is None else {"decoding": decoding.record(places, candidate_names(problem, places))}),
    }
    return problem.decision(list(zip(names, heads, strict=True)), provenance)


def candidate_names(problem: Problem, places: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the names of the candidate heads of every place."""
    return {name: [head_name(spec) for spec in problem.candidates[name]] for name in places}


def _certain(problem: Problem, places: Sequence[str], result: SedonaResult, cuts: Sequence[int]) -> dict[str, Any]:
    """Return, as JSON, which places were learned and where the decision is a tie; and say so."""
    found = certainty(result.alpha, result.beta, result.farthest, cuts)
    candidates = candidate_names(problem, places)
    learned = [places[k] for k in found.learned]
    cut_ties = [places[k] for k in found.cut_ties]
    head_ties = {places[k]: [candidates[places[k]][m] for m in heads] for k, heads in found.head_ties.items()}
    log.info(
        "SEDONA learned %d of %d p_isolate; the others stayed at one half. Ties between cuts: %s; between heads: %s.",
        len(learned),
        len(places),
        ", ".join(cut_ties) or "none",
        "; ".join(f"{place}: {', '.join(map(str, heads))}" for place, heads in head_ties.items()) or "none",
    )
    return {"learned": learned, "ties": {"cuts": cut_ties, "heads": head_ties}, "tolerance": TOLERANCE}


def plan_so_far(settings: SedonaSettings, problem: Problem, places: Sequence[str], result: SedonaResult) -> Plan:
    """Return what a search that could not go on has learned, as a plan."""
    decision = decision_of(settings, problem, places, result)
    heads = tuple(head_name(spec) if spec is not None else None for spec in decision.heads)
    return Plan(cuts=tuple(decision.cuts), heads=heads, provenance=decision.provenance)
