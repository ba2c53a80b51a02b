"""What a search learned, and where its choice is a tie.

A softmax that never left its start decides nothing, and neither does one whose two best entries are equal: which of
them wins is then an accident of rounding or of order. (In the plans that SEDONA's authors released for deep nets,
nearly all late p_isolate stand at 0.5000.) A decision says which of its parts are of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = 0.04
"""Smallest difference of log-odds, or of two heads' logits, that counts: 0.01 in p around one half.

One step of Adam at the default rate moves log-odds by 0.02, whatever the size of the gradient.
"""


@dataclass(frozen=True)
class Certainty:
    """Places are 0-based base layers, heads are numbers of candidates.

    Attributes:
        learned: places whose log-odds of isolating were ever farther than the tolerance from 0 (p_isolate from 1/2).
        cut_ties: places, chosen and not, between which nothing was decided: each has a partner on the other side of the
            decision with log-odds nearer than the tolerance. With the K-1 largest chosen, there are such places exactly
            if the K-1st and the K-th are that near.
        head_ties: for chosen places, the heads whose logits are nearer than the tolerance to the largest, if there are
            several.
    """

    learned: list[int]
    cut_ties: list[int]
    head_ties: dict[int, list[int]]


def certainty(
    alpha: Tensor, beta: Sequence[Tensor], farthest: Tensor, cuts: Sequence[int], tolerance: float = TOLERANCE
) -> Certainty:
    """Tell what was learned from what was not.

    Args:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        farthest: (B-1,), the largest |log-odds| that each place had during the search.
        cuts: the places that were chosen.
        tolerance: in logits.
    """
    preference = log_odds(alpha).tolist()
    chosen, others = set(cuts), [k for k in range(len(preference)) if k not in set(cuts)]
    pairs = [(i, j) for i in chosen for j in others if abs(preference[i] - preference[j]) < tolerance]
    near = {k: [m for m, t in enumerate(beta[k].tolist()) if beta[k].max().item() - t < tolerance] for k in cuts}
    return Certainty(
        learned=[k for k, t in enumerate(farthest.tolist()) if t > tolerance],
        cut_ties=sorted({k for pair in pairs for k in pair}),
        head_ties={k: heads for k, heads in near.items() if len(heads) > 1},
    )


def log_odds(alpha: Tensor) -> Tensor:
    """Return log(p_isolate / p_through) of each place, float64: (B-1, 2) -> (B-1,)."""
    return alpha[:, 0].double() - alpha[:, 1].double()


def mean_entropy(logits: Sequence[Tensor]) -> float:
    """Return the mean entropy of the softmax of each tensor's last dimension, in nats: ln(M) where all M are equal."""
    rows = [row for t in logits for row in t.double().reshape(-1, t.shape[-1])]
    return sum(-(row.softmax(0) * row.log_softmax(0)).sum().item() for row in rows) / len(rows)
