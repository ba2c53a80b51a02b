"""Errors of a search: its own are typed, raised where they are found; those of the user's code go through unchanged."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import DataError, SedonaError, SettingsError
from sedona_fx.search import Balanced, BestOf, Guided, Latest, Rollout, Search, Sedona, Uniform

SEARCHES: dict[str, Search] = {
    "guided": Guided(training_steps=300),
    "rollout": Rollout(steps=4, plans=4),
    "sedona": Sedona(warmup_steps=2, meta_steps=2, unroll=1),
    "sedona, T = 2": Sedona(warmup_steps=2, meta_steps=2, unroll=2, decode="perturbation", perturbation_steps=2),
    "best of": BestOf(search=Balanced(), seeds=2, steps=2),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3))


class Loader:
    """Batches, until `after` of them were drawn in all: then a bug of the user's own."""

    def __init__(self, after: int, bug: Exception | None) -> None:
        self.after, self.bug, self.drawn = after, bug, 0

    def __iter__(self) -> Any:
        for k in range(4):
            self.drawn += 1
            if self.bug is not None and self.drawn > self.after:
                raise self.bug
            generator = torch.Generator().manual_seed(k)
            yield torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)


def find(search: Search, after: int = 10**6, bug: Exception | None = None, **options: Any) -> sedona_fx.Net:
    val = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(2)]
    data = Loader(after, bug)
    return sedona_fx.decouple(
        model(), data, blocks=2, search=search, val_data=val, heads=["linear"], progress=False, **options
    )


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bug", [ValueError("not enough values to unpack"), KeyError("labels"), RuntimeError("broken")])
def test_a_bug_in_the_users_loader_goes_through_with_its_traceback(name: str, bug: Exception) -> None:
    with pytest.raises(type(bug)) as caught:
        find(SEARCHES[name], after=2, bug=bug)
    assert caught.value is bug
    assert not isinstance(caught.value, SedonaError)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "__iter__"


@pytest.mark.parametrize("name", SEARCHES)
def test_a_bug_in_the_users_loss_that_shows_late_goes_through(name: str) -> None:
    calls = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 6:
            raise ValueError("a bug in the loss")
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(ValueError, match="a bug in the loss") as caught:
        find(SEARCHES[name], loss=loss)
    assert not isinstance(caught.value, SedonaError)


WRONG: list[tuple[type[Search], dict[str, Any]]] = [
    (Guided, {"states": 0}),
    (Guided, {"finalists": -1}),
    (Guided, {"seconds": 1.0, "training_steps": 5}),
    (Sedona, {"unroll": 0}),
    (Sedona, {"decode": "best"}),
    (Sedona, {"seconds": -1.0}),
    (Sedona, {"perturbation_steps": 5}),
    (Rollout, {"plans": 0}),
    (Rollout, {"warmup_steps": -1}),
    (Uniform, {"head": "smallest"}),
    (Latest, {"head": "smallest"}),
    (Balanced, {"head": "smallest"}),
    (Balanced, {"by": "seconds"}),
    (BestOf, {"search": Balanced}),
    (BestOf, {"search": Balanced(), "seeds": 0}),
    (BestOf, {"search": Balanced(), "held_out": 1.0}),
]


@pytest.mark.parametrize(("kind", "settings"), WRONG, ids=[f"{k.__name__}-{next(iter(s))}" for k, s in WRONG])
def test_wrong_settings_are_settings_errors(kind: type[Search], settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=kind.__name__) as caught:
        kind(**settings)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["guided", "sedona", "rollout"])
def test_steps_that_do_not_pay_for_a_search_are_settings_errors(name: str) -> None:
    search = {"guided": Guided, "sedona": Sedona, "rollout": Rollout}[name](training_steps=1)
    with pytest.raises(SettingsError, match=r"training_steps=1 does not pay"):
        find(search)


@pytest.mark.parametrize("name", ["guided", "sedona", "rollout", "best of"])
def test_data_that_runs_dry_is_a_data_error(name: str) -> None:
    """The first batch is there, a later epoch is empty."""

    class Once(Loader):
        def __iter__(self) -> Any:
            self.drawn += 1
            return super().__iter__() if self.drawn <= 3 else iter(())

    val = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(2)]
    with pytest.raises(DataError, match="data is empty"):
        sedona_fx.decouple(
            model(), Once(0, None), blocks=2, search=SEARCHES[name], val_data=val, heads=["linear"], progress=False
        )
