"""Settings that searches by trial have in common: the same defaults, checks and words, in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from sedona_fx.errors import SettingsError
from sedona_fx.search import Guided, Rollout
from sedona_fx.search.guided_settings import GuidedSettings
from sedona_fx.search.trial_settings import TrialSettings

BOTH = pytest.mark.parametrize("kind", [Guided, Rollout])


@BOTH
def test_defaults_are_the_common_ones(kind: Any) -> None:
    search = kind()
    common = {f.name: f.default for f in fields(TrialSettings)}
    assert common == {
        "training_steps": None,
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "val_batches": 50,
        "val_batch_size": None,
        "folder": None,
        "save_seconds": 60.0,
    }
    assert {name: getattr(search, name) for name in common} == common
    assert kind(val_batch_size=7, folder="a").val_batch_size == 7
    assert kind(folder="a").folder == "a"


@BOTH
@pytest.mark.parametrize("name", ["training_steps", "val_batches", "val_batch_size"])
def test_what_cannot_be_is_refused_under_the_name_of_the_search(kind: Any, name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{kind.__name__}\({name}=0\): has to be at least 1$"):
        kind(**{name: 0})
    assert getattr(kind(**{name: 1}), name) == 1


def test_further_settings_have_their_own_bounds() -> None:
    with pytest.raises(SettingsError, match=r"^Rollout\(warmup_steps=-1\): has to be at least 0$"):
        Rollout(warmup_steps=-1)
    with pytest.raises(SettingsError, match=r"^Guided\(finalists=-1\): has to be at least 0$"):
        Guided(finalists=-1)
    assert (Rollout(warmup_steps=0).warmup_steps, Guided(finalists=0).finalists) == (0, 0)


def test_each_setting_is_described_once() -> None:
    for f in fields(TrialSettings):
        described = [
            kind for kind in (TrialSettings, GuidedSettings, Rollout) if f"\n        {f.name}: " in (kind.__doc__ or "")
        ]
        assert described == [TrialSettings], f.name
