"""What SEDONA's search has learned, in the end or when it could not go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sedona_fx.search.sedona.certainty import mean_entropy
from sedona_fx.search.sedona.perturbation import Perturbed


@dataclass(frozen=True)
class SedonaResult:
    """What was learned: `alpha` (B-1, 2) logits (isolate, let through) and B-1 tensors `beta` (M_i,), on the CPU.

    `trajectory` has at most 200 evenly spaced points, dictionaries of `step`, `val_loss`, `p_isolate` (B-1),
    `head_weights` (B-1 lists of M_i), and the mean entropies of alpha's and beta's softmax in nats: `entropy_alpha`
    (ln 2 at the start) and `entropy_beta`. `cost` counts what was planned, and as `spent_steps` what was done.
    `farthest` (B-1,) is the largest |log-odds of isolating| that each place ever had. `failures` says where a loss was
    not finite: dictionaries of `where` and `snapshot` (its number, or None in the warm-up). `decoding` is what was
    decided by perturbation, where that was asked for.
    """

    alpha: Tensor
    beta: list[Tensor]
    trajectory: list[dict[str, Any]]
    cost: dict[str, float]
    interrupted: bool
    farthest: Tensor
    failures: list[dict[str, Any]]
    decoding: Perturbed | None = None


class NonFiniteSearch(Exception):
    """Losses of the search are not finite, and it cannot go on. `where` says at which step; `result` is so far."""

    def __init__(self, where: str, result: SedonaResult) -> None:
        self.where, self.result = where, result
        super().__init__(f"the search's loss is not finite {where}")


def trajectory_point(step: int, val_loss: float, alpha: Tensor, beta: list[Tensor]) -> dict[str, Any]:
    """Return a point of the trajectory, as JSON."""
    return {
        "step": step,
        "val_loss": val_loss,
        "p_isolate": alpha.softmax(1)[:, 0].tolist(),
        "head_weights": [b.softmax(0).tolist() for b in beta],
        "entropy_alpha": mean_entropy([alpha]),
        "entropy_beta": mean_entropy(beta),
    }
