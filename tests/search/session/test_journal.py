"""What a journal knows a search by: whatever its plan depends on, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sedona_fx.search import Guided, Rollout, Sedona
from sedona_fx.search.session.journal import settings_of


@pytest.mark.parametrize("search", [Guided(), Rollout(), Sedona()], ids=lambda search: type(search).__name__)
def test_settings_are_those_that_the_plan_depends_on(search: Any) -> None:
    found = settings_of(search)
    where = {"folder": "somewhere", "save_seconds": 1.0}
    if isinstance(search, Sedona):
        where["snapshot_bytes"] = 0
    assert settings_of(dataclasses.replace(search, **where)) == found
    assert found.keys() == {field.name for field in dataclasses.fields(search)} - where.keys()
    assert settings_of(dataclasses.replace(search, lr=0.125)) == {**found, "lr": 0.125}
