"""What SEDONA's search costs, and how many steps of each kind a given cost pays for.

Costs follow from numbers of steps, in units of a plain training step, so a search does the same on a busy machine as on
an idle one. Where seconds are to be shared, they are turned into numbers of steps once, before the search, by the time
that steps took when they were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sedona_fx.errors import SettingsError
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.session.timing import StepSeconds

_UNROLLED_COST = 4.0
"""An unrolled step in relaxed steps: its own cost, and that of differentiating through it.

Measured on convolutional nets on a CPU: 2.4 to 3.7 per unrolled step.
"""
_MAX_SNAPSHOTS = 10  # each is a copy of weights, momentum and buffers, all heads included
_MIN_VISITS = 5  # meta-iterations per snapshot
_FORWARD = 1 / 3  # of a training step
_DECODING_SHARE = 0.25  # what decoding by perturbation may cost of the whole search
_MIN_TRIAL_STEPS, _MAX_TRIAL_STEPS = 5, 50  # where the settings do not say how many


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """The numbers of steps of a search. Costs are in plain training steps (forward and backward pass of the net).

    Attributes:
        warmup_steps: relaxed training steps of the warm-up.
        meta_steps: meta-iterations.
        snapshots: taken in the warm-up.
        relaxed_cost: of one relaxed training step.
        meta_cost: of one meta-iteration, its relaxed training step included.
        decoding_cost: what decoding may cost at most; no other attribute includes it. Infinite: anything.
    """

    warmup_steps: int
    meta_steps: int
    snapshots: int
    relaxed_cost: float
    meta_cost: float
    decoding_cost: float = 0.0

    @property
    def equivalent_steps(self) -> float:
        """Cost of the whole search except for its decoding."""
        return self.warmup_steps * self.relaxed_cost + self.meta_steps * self.meta_cost

    def counts(self) -> dict[str, float]:
        """Return what a plan says about it."""
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


def share(settings: SedonaSettings, work: RelaxedWork) -> SearchCost:
    """Fix the numbers of steps that are None in the settings by what `training_steps` pays for.

    Half goes to the warm-up, the rest to meta-iterations. With ``decode="perturbation"``, a quarter of the whole is
    left to decoding. `training_steps` is not read if both numbers of steps are given.

    Args:
        settings: of the search.
        work: of the net and its heads.

    Raises:
        SettingsError: `training_steps` does not pay for one step of each kind.
    """
    warmup_steps, meta_steps = settings.warmup_steps, settings.meta_steps
    all_heads = 1 + work.heads / work.net
    relaxed = 1 + work.sampled * work.heads / work.net
    validation = 1.0 if work.validation is None else work.validation / work.net
    meta = settings.unroll * _UNROLLED_COST * all_heads + relaxed + validation
    decoding = _decoding_share(settings)
    total = (settings.training_steps or 0) * (1 - decoding)
    needed = max(2 * relaxed, 2 * meta)
    if warmup_steps is not None or meta_steps is not None:
        needed = (warmup_steps or 1) * relaxed + (meta_steps or 1) * meta
    if warmup_steps is None:
        warmup_steps = math.floor((total / 2 if meta_steps is None else total - meta_steps * meta) / relaxed)
    if meta_steps is None:
        meta_steps = math.floor((total - warmup_steps * relaxed) / meta)
    if min(warmup_steps, meta_steps) < 1:
        raise SettingsError(
            f"training_steps={settings.training_steps or 0} does not pay for a search: a meta-iteration costs as much "
            f"as {meta:.1f} training steps, a relaxed step as much as {relaxed:.1f}. Raise training_steps to "
            f"{math.ceil(needed / (1 - decoding))} or more, or use 'balanced' or 'uniform' cuts, which need no search."
        )
    snapshots = settings.snapshots
    if snapshots is None:
        snapshots = max(1, min(_MAX_SNAPSHOTS, meta_steps // _MIN_VISITS))
    decoding_cost = decoding / (1 - decoding) * (warmup_steps * relaxed + meta_steps * meta)
    if None not in (settings.warmup_steps, settings.meta_steps, settings.perturbation_steps):
        decoding_cost = math.inf  # all numbers are given: every choice is tried
    return SearchCost(
        warmup_steps=warmup_steps,
        meta_steps=meta_steps,
        snapshots=min(snapshots, warmup_steps),
        relaxed_cost=relaxed,
        meta_cost=meta,
        decoding_cost=decoding_cost,
    )


def share_seconds(settings: SedonaSettings, work: RelaxedWork, step_seconds: StepSeconds, seconds: float) -> SearchCost:
    """Fix the numbers of steps by what seconds pay for: half of them for the warm-up, the rest for meta-iterations.

    With ``decode="perturbation"``, a quarter of the seconds is left to decoding.

    Args:
        settings: of the search.
        work: of the net and its heads.
        step_seconds: what steps took when they were measured.
        seconds: what is left of those of the settings after measuring.

    Raises:
        SettingsError: the seconds do not pay for one step of each kind.
    """
    decoding = _decoding_share(settings)
    for_search = (1 - decoding) * seconds
    warmup_steps = math.floor(for_search / 2 / step_seconds.relaxed_seconds)
    meta_steps = math.floor((for_search - warmup_steps * step_seconds.relaxed_seconds) / step_seconds.meta_seconds)
    if min(warmup_steps, meta_steps) < 1:
        needed = max(2 * step_seconds.relaxed_seconds, 2 * step_seconds.meta_seconds) / (1 - decoding)
        raise SettingsError(
            f"the {seconds:.2g} s that measuring leaves of `seconds` do not pay for a search: a relaxed step takes "
            f"{step_seconds.relaxed_seconds:.2g} s here, a meta-iteration {step_seconds.meta_seconds:.2g} s. Leave "
            f"{needed:.2g} s or more for them, or use 'balanced' or 'uniform' cuts, which need no search."
        )
    search_cost = share(replace(settings, seconds=None, warmup_steps=warmup_steps, meta_steps=meta_steps), work)
    decoding_cost = decoding * seconds / step_seconds.relaxed_seconds * search_cost.relaxed_cost
    return replace(search_cost, decoding_cost=decoding_cost)


@dataclass(frozen=True)
class Trials:
    """What decoding by perturbation does at most.

    Attributes:
        rounds: K - 1, one per cut.
        choices: that are tried in a round.
        steps: relaxed training steps of one trial.
        step_cost: of a relaxed step with all heads and of a validation batch, in plain training steps.
    """

    rounds: int
    choices: int
    steps: int
    step_cost: float

    @property
    def equivalent_steps(self) -> float:
        """Cost of all trials, in plain training steps."""
        return self.rounds * self.choices * self.steps * self.step_cost

    def __str__(self) -> str:
        return (
            f"decoding by perturbation: {self.rounds} rounds of at most {self.choices} choices, {self.steps} steps each"
            f" = {self.equivalent_steps:.0f} training steps"
        )


def share_trials(allowed: float, work: RelaxedWork, rounds: int, choices: int, steps: int | None) -> Trials:
    """Fix the number of trials by what plain training steps pay for.

    Args:
        allowed: plain training steps. May be infinite if `steps` is given.
        work: of the net and its heads, all of which run in a trial.
        rounds: K - 1.
        choices: (place, head) pairs that there are. Fewer are tried if `allowed` does not pay for all.
        steps: relaxed training steps of one trial. None: from 5 to 50, as many as pay for trying all choices.

    Raises:
        SettingsError: `allowed` does not pay for two choices per round.
    """
    validation = 1.0 if work.validation is None else work.validation / work.net
    step_cost = 1 + work.heads / work.net + _FORWARD * validation
    if steps is None:
        affordable = math.floor(allowed / (rounds * choices * step_cost))
        steps = min(_MAX_TRIAL_STEPS, max(_MIN_TRIAL_STEPS, affordable))
    tried = math.floor(min(choices, allowed / (rounds * steps * step_cost)))
    if tried < min(2, choices):
        needed = 2 * rounds * steps * step_cost
        raise SettingsError(
            f"decoding by perturbation may cost {allowed:.0f} training steps here, but trying 2 choices in each of "
            f"{rounds} rounds, {steps} steps each, costs {needed:.0f}. Let the search cost {needed / allowed:.1f} times"
            " as much, lower perturbation_steps, or take decode='argmax'."
        )
    return Trials(rounds, tried, steps, step_cost)


def _decoding_share(settings: SedonaSettings) -> float:
    return _DECODING_SHARE if settings.decode == "perturbation" else 0.0
