"""``Sedona(sampled_cuts=...)``: ordinary relaxed steps run the heads of a few cuts, the search stays reproducible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.search import Sedona
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.sedona import steps as inner
from sedona_fx.search.sedona.search_cost import share


def plan(search: Sedona) -> sedona_fx.Plan:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)) for _ in range(5)]
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(8, 6, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(5)]
    return sedona_fx.decouple(
        nn.Sequential(*layers, nn.Linear(6, 3)), data, blocks=3, heads=["linear"], search=search, progress=False
    ).plan


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, float] | None]:
    """What each relaxed step of a search drew."""
    seen: list[dict[int, float] | None] = []
    step = inner.relaxed_gradients

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["sampled"])
        found = step(*args, **kwargs)
        assert len(found.losses) == (len(kwargs["sampled"]) if kwargs["sampled"] else len(args[0].blocks) - 1) + 1
        return found

    monkeypatch.setattr(inner, "relaxed_gradients", spy)
    return seen


@pytest.mark.parametrize("unroll", [1, 2])
def test_every_ordinary_step_runs_the_heads_of_other_cuts(steps: list[Any], unroll: int) -> None:
    settings = Sedona(warmup_steps=12, meta_steps=4, snapshots=2, unroll=unroll, sampled_cuts=2)
    found = plan(settings)
    ordinary = steps[-16:]  # what comes before them measures
    places = len(found.base_layers)
    assert all(len(drawn) == 2 and set(drawn.values()) == {places / 2} for drawn in ordinary)
    assert len({tuple(drawn) for drawn in ordinary}) > 3
    assert plan(settings).to_json() == found.to_json()


def test_all_heads_run_by_default_and_where_more_are_asked_for_than_there_are(steps: list[Any]) -> None:
    plan(Sedona(warmup_steps=2, meta_steps=1, snapshots=1, unroll=1))
    assert set(steps) == {None}
    steps.clear()
    plan(Sedona(warmup_steps=2, meta_steps=1, snapshots=1, unroll=1, sampled_cuts=99))
    assert all(set(drawn.values()) == {1.0} for drawn in steps)


def test_sampled_steps_are_counted_as_what_they_cost() -> None:
    settings = Sedona(training_steps=1000, unroll=1)
    whole = share(settings, RelaxedWork(net=1.0, heads=8.0))
    part = share(settings, RelaxedWork(net=1.0, heads=8.0, sampled=0.25))
    assert (whole.relaxed_cost, part.relaxed_cost) == (9.0, 3.0)
    assert whole.meta_cost - part.meta_cost == 6.0  # its one ordinary step; the unrolled one has all heads
    assert part.equivalent_steps <= 1000


def test_at_least_one_cut() -> None:
    with pytest.raises(ValueError, match=r"sampled_cuts=0"):
        Sedona(sampled_cuts=0)
