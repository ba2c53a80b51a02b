"""What a search costs, from counts alone, and how many steps of each kind a given cost buys.

No clock is read, but where seconds are to be shared: by a pace that was measured before the search, once. From there on
it does the same on a busy machine as on an idle one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.session.timing import StepSeconds

# An unrolled step in relaxed steps: its own cost, and what it takes to differentiate through it (measured on
# convolutional nets on a CPU: 2.4 to 3.7 for each unrolled step).
_UNROLLED_COST = 4.0
_MOST_SNAPSHOTS = 10  # each is a copy of weights, momentum and buffers, all heads included
_VISITS = 5  # meta-iterations a snapshot, at least
_FORWARD = 1 / 3  # of a training step

DECODING_SHARE = 0.25
"""What decoding by perturbation may cost of the whole search."""
_LEAST_TRIAL, _MOST_TRIAL = 5, 50  # steps of a trial, where nobody says how many


@dataclass(frozen=True)
class Budget:
    """What a search will do. Costs are in plain training steps of the undecoupled net (forward and backward)."""

    warmup_steps: int
    meta_steps: int
    snapshots: int
    relaxed_cost: float  # of one relaxed training step
    meta_cost: float  # of one meta-iteration, its relaxed training step included
    decoding_cost: float = 0.0  # what decoding may cost at most, not counted in the rest; infinite: anything

    @property
    def equivalent_steps(self) -> float:
        """Cost of the whole search, but for its decoding."""
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
    decoding: float = 0.0,
) -> Budget:
    """Buy what is `None` with `training_steps` plain training steps: half for the warm-up, the rest for the search.

    Steps that are given stay as they are; if both are, `training_steps` is not read. `decoding` is the share of the
    whole that is left to decoding.

    Raises:
        SettingsError: it does not pay for a single step of each kind.
    """
    full = 1 + work.heads / work.net
    relaxed = 1 + work.sampled * work.heads / work.net
    validation = 1.0 if work.validation is None else work.validation / work.net
    meta = unroll * _UNROLLED_COST * full + relaxed + validation
    total = (training_steps or 0) * (1 - decoding)
    need = max(2 * relaxed, 2 * meta)
    if warmup_steps is not None or meta_steps is not None:
        need = (warmup_steps or 1) * relaxed + (meta_steps or 1) * meta
    if warmup_steps is None:
        warmup_steps = math.floor((total / 2 if meta_steps is None else total - meta_steps * meta) / relaxed)
    if meta_steps is None:
        meta_steps = math.floor((total - warmup_steps * relaxed) / meta)
    if min(warmup_steps, meta_steps) < 1:
        raise SettingsError(
            f"training_steps={training_steps or 0} does not pay for a search: a meta-iteration costs as much as "
            f"{meta:.1f} training steps, a relaxed step as much as {relaxed:.1f}. Raise training_steps to "
            f"{math.ceil(need / (1 - decoding))} or more, or use 'balanced' or 'uniform' cuts, which need no search."
        )
    if snapshots is None:
        snapshots = max(1, min(_MOST_SNAPSHOTS, meta_steps // _VISITS))
    cost = decoding / (1 - decoding) * (warmup_steps * relaxed + meta_steps * meta)
    return Budget(warmup_steps, meta_steps, min(snapshots, warmup_steps), relaxed, meta, cost)


def share_seconds(
    seconds: float, pace: StepSeconds, work: RelaxedWork, unroll: int, snapshots: int | None, decoding: float = 0.0
) -> Budget:
    """Turn seconds into counts of steps, at the pace that was measured: half for the warm-up, the rest for the search.

    `decoding` is the share of the seconds that is left to decoding.

    Raises:
        SettingsError: they do not pay for a single step of each kind.
    """
    for_search = (1 - decoding) * seconds
    warmup_steps = math.floor(for_search / 2 / pace.relaxed_seconds)
    meta_steps = math.floor((for_search - warmup_steps * pace.relaxed_seconds) / pace.meta_seconds)
    if min(warmup_steps, meta_steps) < 1:
        need = max(2 * pace.relaxed_seconds, 2 * pace.meta_seconds) / (1 - decoding)
        raise SettingsError(
            f"the {seconds:.2g} s that measuring leaves of `seconds` do not pay for a search: a relaxed step takes "
            f"{pace.relaxed_seconds:.2g} s here, a meta-iteration {pace.meta_seconds:.2g} s. Leave {need:.2g} s or "
            f"more for them, or use 'balanced' or 'uniform' cuts, which need no search."
        )
    budget = share(None, work, unroll, warmup_steps, meta_steps, snapshots)
    return replace(budget, decoding_cost=decoding * seconds / pace.relaxed_seconds * budget.relaxed_cost)


@dataclass(frozen=True)
class Trials:
    """What decoding by perturbation does at most: in each of its rounds, `choices` trials of so many relaxed steps."""

    rounds: int
    choices: int
    steps: int
    step_cost: float  # of a relaxed step with all heads and of a validation batch, in plain training steps

    @property
    def equivalent_steps(self) -> float:
        """Cost of all of them."""
        return self.rounds * self.choices * self.steps * self.step_cost

    def __str__(self) -> str:
        return (
            f"decoding by perturbation: {self.rounds} rounds of at most {self.choices} choices, {self.steps} steps each"
            f" = {self.equivalent_steps:.0f} training steps"
        )


def share_trials(allowed: float, work: RelaxedWork, rounds: int, choices: int, steps: int | None) -> Trials:
    """Buy trials with `allowed` plain training steps.

    Args:
        allowed: infinite if `steps` is given and any cost will do.
        work: of the steps; all heads run.
        rounds: K - 1.
        choices: how many there are, (place, head) pairs. Fewer are tried where the cost does not pay for all.
        steps: of a trial. None: as many as pay for all choices, from 5 to 50.

    Raises:
        SettingsError: the cost does not pay for two choices a round.
    """
    validation = 1.0 if work.validation is None else work.validation / work.net
    step_cost = 1 + work.heads / work.net + _FORWARD * validation
    if steps is None:
        steps = min(_MOST_TRIAL, max(_LEAST_TRIAL, math.floor(allowed / (rounds * choices * step_cost))))
    tried = math.floor(min(choices, allowed / (rounds * steps * step_cost)))
    if tried < min(2, choices):
        need = 2 * rounds * steps * step_cost
        raise SettingsError(
            f"decoding by perturbation may cost {allowed:.0f} training steps here, but trying 2 choices in each of "
            f"{rounds} rounds, {steps} steps each, costs {need:.0f}. Let the search cost {need / allowed:.1f} times as "
            f"much, lower perturbation_steps, or take decode='argmax'."
        )
    return Trials(rounds, tried, steps, step_cost)
