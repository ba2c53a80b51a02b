"""From learned logits to a decision: where to cut, and which head to keep."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.plan_costs import allowed, best_plans
from sedona_fx.search.problem.problem import Problem


def decode(alpha: Tensor, beta: Sequence[Tensor], blocks: int) -> tuple[list[int], list[int]]:
    """Cut behind the `blocks` - 1 base layers with the largest p_isolate, and keep the likeliest head of each.

    Any number of blocks can be decoded from one search (SEDONA, Pyeon et al., ICLR 2021, section 3). The order is that
    of alpha[:, 0] - alpha[:, 1], which is that of p_isolate but does not saturate at 1. Of equal base layers the
    earlier one is cut, of equal heads the first one kept.

    Args:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        blocks: K, from 1 to B.

    Returns:
        The 0-based base layers to cut behind, ascending, and for each of them the index of its head.
    """
    if not 1 <= blocks <= len(beta) + 1:
        raise SettingsError(f"{len(beta) + 1} base layers make 1 to {len(beta) + 1} blocks, not {blocks}")
    preference = (alpha[:, 0].double() - alpha[:, 1].double()).tolist()
    ranked = sorted(range(len(preference)), key=lambda i: (-preference[i], i))
    cuts = sorted(ranked[: blocks - 1])
    heads = []
    for i in cuts:
        logits = beta[i].tolist()
        heads.append(logits.index(max(logits)))
    return cuts, heads


def decode_within(problem: Problem, alpha: Tensor, beta: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Decode as :func:`decode` does, if that plan keeps within the problem's limits; else the best one that does.

    The best has the largest sum, over its cuts, of the log-odds of p_isolate and the log of the head's weight:
    ``alpha[i, 0] - alpha[i, 1] + log_softmax(beta[i])[m]``, exactly.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    cuts, heads = decode(alpha, beta, problem.blocks)
    places = problem.places()
    if allowed(problem, tuple((places[k], m) for k, m in zip(cuts, heads, strict=True))):
        return cuts, heads
    scores = [[-score for score in row] for row in preferences(alpha, beta)]
    (best,) = best_plans(problem, scores, count=1)
    return [problem.position(place) for place, _ in best], [m for _, m in best]


def preferences(alpha: Tensor, beta: Sequence[Tensor]) -> list[list[float]]:
    """Return, for each place and each of its heads, the log-odds of p_isolate plus the log of the head's weight."""
    odds = (alpha[:, 0].double() - alpha[:, 1].double()).tolist()
    weights = [logits.double().log_softmax(0).tolist() for logits in beta]
    return [[isolate + w for w in row] for isolate, row in zip(odds, weights, strict=True)]
