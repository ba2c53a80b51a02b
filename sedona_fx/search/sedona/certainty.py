"""Which parts of a decision were learned, and which are ties. It decides nothing: it judges cuts that were chosen.

A softmax that stayed at its start says nothing, and neither does one whose two best entries are equal: which of them
wins is then an accident of rounding or of order. (In the plans that SEDONA's authors released for deep nets, nearly all
late p_isolate are 0.5000.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sedona_fx.search.sedona.decode import log_odds

TOLERANCE = 0.04
"""Smallest difference of log-odds, or of two heads' logits, that counts: 0.01 in p around one half.

One step of Adam at the default rate moves log-odds by 0.02, whatever the size of the gradient.
"""


@dataclass(frozen=True)
class Certainty:
    """What was learned, and what is a tie. Places are 0-based base layers, heads are indices of candidates.

    Attributes:
        learned: places whose log-odds of isolating were ever farther than the tolerance from 0 (p_isolate from 1/2).
        cut_ties: chosen and rejected places that differ by too little: each has a partner on the other side of the
            decision whose log-odds are within the tolerance of its own. As the K-1 largest are chosen, there are such
            places exactly if the K-1st and the K-th are within the tolerance.
        head_ties: by chosen place, the heads whose logits are within the tolerance of the largest, if there are
            several.
    """

    learned: list[int]
    cut_ties: list[int]
    head_ties: dict[int, list[int]]


def certainty(
    alpha: Tensor, beta: Sequence[Tensor], farthest: Tensor, cuts: Sequence[int], tolerance: float = TOLERANCE
) -> Certainty:
    """Tell what was learned from what was not, and find the ties.

    Args:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        farthest: (B-1,), the largest |log-odds| that each place had during the search.
        cuts: the places that were chosen.
        tolerance: in logits.
    """
    odds, chosen = log_odds(alpha).tolist(), set(cuts)
    rejected = [place for place in range(len(odds)) if place not in chosen]
    pairs = [(a, b) for a in chosen for b in rejected if abs(odds[a] - odds[b]) < tolerance]
    best_heads = {
        place: [head for head, t in enumerate(beta[place].tolist()) if beta[place].max().item() - t < tolerance]
        for place in cuts
    }
    return Certainty(
        learned=[place for place, distance in enumerate(farthest.tolist()) if distance > tolerance],
        cut_ties=sorted({place for pair in pairs for place in pair}),
        head_ties={place: heads for place, heads in best_heads.items() if len(heads) > 1},
    )


def mean_entropy(logits: Sequence[Tensor]) -> float:
    """Return the mean entropy of the softmax of each tensor's last dimension, in nats: ln(M) where all M are equal."""
    rows = [row for t in logits for row in t.double().reshape(-1, t.shape[-1])]
    return sum(-(row.softmax(0) * row.log_softmax(0)).sum().item() for row in rows) / len(rows)
