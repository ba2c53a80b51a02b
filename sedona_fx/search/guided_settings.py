"""Settings of the guided search, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass

from sedona_fx.errors import SettingsError
from sedona_fx.search.trial_settings import TrialSettings


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(TrialSettings):
    """Settings of the search; further ones are those of its base class.

    Args:
        seconds: what the search may cost in seconds on this machine, in place of `training_steps`. A few steps are
            timed before the start; the numbers of steps that follow are kept in the plan and in `folder`.
        states: at how many states of the weights gradients are compared, at most.
        finalists: how many plans are rolled out, at most. With 0 or 1, gradients decide alone; so they do where a
            parameter is used on both sides of a place to cut.
        batch_size: samples per step of the first part; larger batches are split. For the same cost, more and noisier
            steps train the net and its heads further.
    """

    seconds: float | None = None
    states: int = 8
    finalists: int = 6
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(states=1, finalists=0, batch_size=1)
        if self.seconds is not None and (self.seconds <= 0 or self.training_steps is not None):
            why = "has to be above 0" if self.seconds <= 0 else "it is another way to say training_steps: give one"
            raise SettingsError(f"{type(self).__name__}(seconds={self.seconds}): {why}")
