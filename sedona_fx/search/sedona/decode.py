"""Decoding by the learned logits alone: at which base layers to cut, and which candidate head each cut gets.

The other way to decode trains the net a little for each choice (:mod:`~sedona_fx.search.sedona.perturbation`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.plan_costs import allowed, best_plans
from sedona_fx.search.problem.problem import Problem


def decode(alpha: Tensor, beta: Sequence[Tensor], blocks: int) -> tuple[list[int], list[int]]:
    """Cut after the `blocks` - 1 base layers with the largest p_isolate, and keep the most likely head of each.

    One search can be decoded to any number of blocks (SEDONA, Pyeon et al., ICLR 2021, section 3). Base layers are
    ranked by :func:`log_odds`, which has the order of p_isolate but does not saturate at 1. Of equal base layers the
    earlier one is cut, of equal heads the first one is kept.

    Args:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        blocks: K, from 1 to B.

    Returns:
        The 0-based base layers to cut after, ascending, and for each of them the index of its head.

    Raises:
        SettingsError: the base layers do not make that many blocks.
    """
    if not 1 <= blocks <= len(beta) + 1:
        raise SettingsError(f"{len(beta) + 1} base layers make 1 to {len(beta) + 1} blocks, not {blocks}")
    preference = log_odds(alpha).tolist()
    ranked = sorted(range(len(preference)), key=lambda place: (-preference[place], place))
    cuts = sorted(ranked[: blocks - 1])
    heads = []
    for place in cuts:
        logits = beta[place].tolist()
        heads.append(logits.index(max(logits)))
    return cuts, heads


def decode_within(problem: Problem, alpha: Tensor, beta: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Decode as :func:`decode` does if that plan keeps within the problem's limits, otherwise to the best that does.

    The best plan has the largest sum of :func:`preferences` over its cuts; it is found exactly.

    Args:
        problem: the number of blocks, the places to cut and the limits.
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).

    Returns:
        As :func:`decode`.

    Raises:
        BudgetError: no plan keeps within the limits.
    """
    cuts, heads = decode(alpha, beta, problem.blocks)
    places = problem.places()
    if allowed(problem, tuple((places[cut], head) for cut, head in zip(cuts, heads, strict=True))):
        return cuts, heads
    costs = [[-preference for preference in row] for row in preferences(alpha, beta)]
    (best,) = best_plans(problem, costs, count=1)
    return [problem.position(place) for place, _ in best], [head for _, head in best]


def preferences(alpha: Tensor, beta: Sequence[Tensor]) -> list[list[float]]:
    """Return how much the search prefers each place i with each of its heads m.

    It is the log-odds of p_isolate plus the log of the head's weight: ``alpha[i, 0] - alpha[i, 1] +
    log_softmax(beta[i])[m]``.
    """
    weights = [logits.double().log_softmax(0).tolist() for logits in beta]
    return [[odds + weight for weight in row] for odds, row in zip(log_odds(alpha).tolist(), weights, strict=True)]


def log_odds(alpha: Tensor) -> Tensor:
    """Return log(p_isolate / p_through) of each place, float64: (B-1, 2) -> (B-1,)."""
    return alpha[:, 0].double() - alpha[:, 1].double()
