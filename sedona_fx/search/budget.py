"""What a search costs, from counts alone, and how many steps of each kind a given cost buys.

No clock is read, but where seconds are to be shared: by a pace that was measured before the search, once. From there on
it does the same on a busy machine as on an idle one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sedona_fx.search.pace import Pace

# An unrolled step in relaxed steps: its own cost, and what it takes to differentiate through it (measured on
# convolutional nets on a CPU: 2.4 to 3.7 for each unrolled step).
_UNROLLED_COST = 4.0
_MOST_SNAPSHOTS = 10  # each is a copy of weights, momentum and buffers, all heads included
_VISITS = 5  # meta-iterations a snapshot, at least


@dataclass(frozen=True)
class RelaxedWork:
    """Work of one step, in any unit: of the net and of all heads on a training batch, of the net on a validation batch
    (None: as on a training batch).
    """

    net: float
    heads: float
    validation: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a search will do. Costs are in plain training steps of the undecoupled net (forward and backward)."""

    warmup_steps: int
    meta_steps: int
    snapshots: int
    relaxed_cost: float  # of one relaxed training step
    meta_cost: float  # of one meta-iteration, its relaxed training step included

    @property
    def equivalent_steps(self) -> float:
        """Cost of the whole search."""
        return self.warmup_steps * self.relaxed_cost + self.meta_steps * self.meta_cost

    def counts(self) -> dict[str, float]:
        """Return what a plan says of it."""
        return {
            "relaxed_steps": self.warmup_steps + self.meta_steps,
            "meta_iterations": self.meta_steps,
            "equivalent_steps": self.equivalent_steps,
            "snapshots": self.snapshots,
        }

    def __str__(self) -> str:
        return (
            f"SEDONA: {self.warmup_steps + self.meta_steps} relaxed steps + {self.meta_steps} meta-iterations"
            f" = {self.equivalent_steps:.0f} training steps"
        )


def share(
    training_steps: int | None,
    work: RelaxedWork,
    unroll: int,
    warmup_steps: int | None,
    meta_steps: int | None,
    snapshots: int | None,
) -> Budget:
    """Buy what is `None` with `training_steps` plain training steps: half for the warm-up, the rest for the search.

    Steps that are given stay as they are; if both are, `training_steps` is not read.

    Raises:
        ValueError: it does not pay for a single step of each kind.
    """
    relaxed = 1 + work.heads / work.net
    validation = 1.0 if work.validation is None else work.validation / work.net
    meta = (unroll * _UNROLLED_COST + 1) * relaxed + validation
    total = training_steps or 0
    need = max(2 * relaxed, 2 * meta)
    if warmup_steps is not None or meta_steps is not None:
        need = (warmup_steps or 1) * relaxed + (meta_steps or 1) * meta
    if warmup_steps is None:
        warmup_steps = math.floor((total / 2 if meta_steps is None else total - meta_steps * meta) / relaxed)
    if meta_steps is None:
        meta_steps = math.floor((total - warmup_steps * relaxed) / meta)
    if min(warmup_steps, meta_steps) < 1:
        raise ValueError(
            f"training_steps={total} does not pay for a search: a meta-iteration costs as much as {meta:.1f} training "
            f"steps, a relaxed step as much as {relaxed:.1f}. Raise training_steps to {math.ceil(need)} or more, or "
            f"use 'balanced' or 'uniform' cuts, which need no search."
        )
    if snapshots is None:
        snapshots = max(1, min(_MOST_SNAPSHOTS, meta_steps // _VISITS))
    return Budget(warmup_steps, meta_steps, min(snapshots, warmup_steps), relaxed, meta)


def share_seconds(seconds: float, pace: Pace, work: RelaxedWork, unroll: int, snapshots: int | None) -> Budget:
    """Turn seconds into counts of steps, at the pace that was measured: half for the warm-up, the rest for the search.

    Raises:
        ValueError: they do not pay for a single step of each kind.
    """
    warmup_steps = math.floor(seconds / 2 / pace.relaxed_seconds)
    meta_steps = math.floor((seconds - warmup_steps * pace.relaxed_seconds) / pace.meta_seconds)
    if min(warmup_steps, meta_steps) < 1:
        need = max(2 * pace.relaxed_seconds, 2 * pace.meta_seconds)
        raise ValueError(
            f"the {seconds:.2g} s that measuring leaves of `seconds` do not pay for a search: a relaxed step takes "
            f"{pace.relaxed_seconds:.2g} s here, a meta-iteration {pace.meta_seconds:.2g} s. Leave {need:.2g} s or "
            f"more for them, or use 'balanced' or 'uniform' cuts, which need no search."
        )
    return share(None, work, unroll, warmup_steps, meta_steps, snapshots)
