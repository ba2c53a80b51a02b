"""What SEDONA's search has done and learned, while it runs, in the end, or when it cannot go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from sedona_fx.search.relaxed.state import Logits
from sedona_fx.search.sedona.certainty import mean_entropy
from sedona_fx.search.sedona.perturbation import Perturbed


@dataclass
class History:
    """What a search has done so far. Its fields are saved with the search and restored.

    Attributes:
        where: the step that runs now or ran last, in words, for messages.
        spent_steps: cost so far, in plain training steps.
        warmup_steps: relaxed training steps of the warm-up so far.
        meta_steps: meta-iterations so far.
        bad_snapshots: indices of snapshots whose loss was not finite.
        failures: as in :class:`SedonaResult`.
        trajectory: as in :class:`SedonaResult`.
    """

    where: str = "the start"
    spent_steps: float = 0.0
    warmup_steps: int = 0
    meta_steps: int = 0
    bad_snapshots: list[int] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over the fields of a saved history."""
        for f in fields(self):
            setattr(self, f.name, saved[f.name])


@dataclass(frozen=True, kw_only=True)
class SedonaResult:
    """What was learned. All tensors are on the CPU.

    Attributes:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        trajectory: at most 200 evenly spaced points (:func:`trajectory_point`).
        cost: the planned numbers of steps and their cost, and as `spent_steps` the cost of what was done, in plain
            training steps.
        interrupted: whether Ctrl-C ended the search.
        farthest: (B-1,), the largest |log-odds of isolating| that each place ever had.
        failures: where a loss was not finite: dictionaries of `where` and `snapshot` (its index; None in the warm-up).
        decoding: what decoding by perturbation decided; None where it was not asked for.
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
    """Losses of the search are infinite or NaN, and it cannot go on.

    Attributes:
        where: at which step, in words.
        result: what was learned until then.
    """

    def __init__(self, where: str, result: SedonaResult) -> None:
        self.where, self.result = where, result
        super().__init__(f"the search's loss is not finite {where}")


def trajectory_point(step: int, val_loss: float, logits: Logits) -> dict[str, Any]:
    """Return a point of the trajectory, as JSON.

    Returns:
        `step`, the number of the meta-iteration; its `val_loss`; `p_isolate` (B-1); `head_weights` (B-1 lists of M_i);
        the mean entropies of the softmax of alpha and of beta in nats, `entropy_alpha` (ln 2 at the start) and
        `entropy_beta`.
    """
    return {
        "step": step,
        "val_loss": val_loss,
        "p_isolate": logits.alpha.softmax(1)[:, 0].tolist(),
        "head_weights": [b.softmax(0).tolist() for b in logits.beta],
        "entropy_alpha": mean_entropy([logits.alpha]),
        "entropy_beta": mean_entropy(logits.beta),
    }
