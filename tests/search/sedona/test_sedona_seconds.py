"""A search bounded by seconds: measured once, turned into counts, and from there on like any other."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_search import SMALL, WORK, batches, loss, make_blocks, same, search

from sedona_fx.rng import random_states
from sedona_fx.search.sedona import bilevel
from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.search_cost import share_seconds
from sedona_fx.search.sedona.sedona import Sedona
from sedona_fx.search.session.timing import StepSeconds

TIMED = Sedona(seconds=100.0, snapshots=3, unroll=2)


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch) -> list[StepSeconds]:
    """Measurements run as they would, but what they tell is given: the last entry."""
    given = [StepSeconds(relaxed_seconds=10.0, meta_seconds=12.0)]
    measure = bilevel.measure

    def measured(*args: Any) -> StepSeconds:
        found = measure(*args)
        assert min(found.relaxed_seconds, found.meta_seconds) > 0
        return given[-1]

    monkeypatch.setattr(bilevel, "measure", measured)
    return given


def test_seconds_become_the_counts_that_they_pay_for(
    paces: list[StepSeconds], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = search(TIMED)  # nearly 100 s: 4 steps of 10 s, as a fifth one would not fit into half; then 4 of 12 s
    assert found.cost["meta_iterations"] == 4
    assert found.cost["relaxed_steps"] == 4 + 4
    assert (found.cost["relaxed_seconds"], found.cost["meta_seconds"]) == (10.0, 12.0)
    said = re.search(r"SEDONA: 8 relaxed steps \+ 4 meta-iterations = \d+ training steps, about 01:28 ", caplog.text)
    assert said is not None
    counts = {"warmup_steps": 4, "meta_steps": 4}
    assert same(found, search(replace(TIMED, seconds=None, **counts)))  # measuring has left no trace


def test_measuring_gives_everything_back(paces: list[StepSeconds]) -> None:
    generator = torch.Generator().manual_seed(7)

    class Epochs:
        generators = (generator,)
        epoch = staticmethod(batches())

        def __call__(self) -> Any:
            torch.rand(1, generator=generator)
            return self.epoch()

    blocks = make_blocks()
    weights = [t.clone() for b in blocks for t in b.module.state_dict().values()]
    torch.manual_seed(3)
    own, before = generator.get_state(), random_states([])
    result = TIMED.run(
        blocks, loss, train_batches=Epochs(), val_batches=batches(size=16), work=WORK, seed=0, progress=False
    )
    assert result.cost["spent_steps"] > 0
    after = random_states([])
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert torch.equal(own, generator.get_state())
    now = [t for b in blocks for t in b.module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


def test_a_resumed_search_keeps_the_counts_of_the_first_measurement(paces: list[StepSeconds], tmp_path: Path) -> None:
    settings = replace(TIMED, folder=tmp_path, save_seconds=0.0)

    def event(n: int) -> None:
        if n == 4 + 3 + 4 + 5:  # 7 batches were for measuring: in the second meta-iteration
            raise KeyboardInterrupt

    assert search(settings, train=batches(event=event)).interrupted
    whole = search(TIMED)
    paces.append(StepSeconds(relaxed_seconds=1.0, meta_seconds=1.0))  # a faster machine: it is not asked again
    again = search(settings)
    assert same(whole, again)
    assert whole.cost == again.cost


def test_a_long_search_is_measured_to_say_how_long_it_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, warmup_steps=20, meta_steps=100, unroll=1)
    with caplog.at_level(logging.INFO):
        short = search(replace(settings, meta_steps=10))
        assert "about" not in caplog.text
        found = search(settings)
    assert re.search(r"= \d+ training steps, about 0\d:\d\d ", caplog.text)
    assert "relaxed_seconds" not in found.cost  # nothing depends on it, so the plan does not say it
    monkeypatch.setattr(BilevelSearch, "measure", lambda self: None)
    assert same(found, search(settings))
    assert short.cost["spent_steps"] < found.cost["spent_steps"]


@pytest.mark.parametrize("seconds", [0.1, 1.0, 7.7, 1e5])
@pytest.mark.parametrize("pace", [StepSeconds(0.01, 0.03), StepSeconds(0.002, 0.7)])
def test_the_counts_fit_into_the_seconds(seconds: float, pace: StepSeconds) -> None:
    def spent(b: Any) -> float:
        return float(b.warmup_steps * pace.relaxed_seconds + b.meta_steps * pace.meta_seconds)

    if seconds < 2 * pace.meta_seconds:
        with pytest.raises(ValueError, match=r"Leave 1\.4 s or more for them"):
            share_seconds(Sedona(unroll=3), WORK, pace, seconds)
        return
    budget = share_seconds(Sedona(unroll=3), WORK, pace, seconds)
    assert seconds - pace.meta_seconds - pace.relaxed_seconds < spent(budget) <= seconds
    assert 1 <= budget.snapshots <= budget.warmup_steps


def test_what_does_not_go_with_seconds_is_refused() -> None:
    for name in ("training_steps", "warmup_steps", "meta_steps"):
        with pytest.raises(ValueError, match=f"it would find {name} itself"):
            Sedona(seconds=5.0, **{name: 3})
    with pytest.raises(ValueError, match="has to be above 0"):
        Sedona(seconds=0.0)
    with pytest.raises(ValueError, match="do not pay for a search"):
        search(replace(TIMED, seconds=1e-6))
