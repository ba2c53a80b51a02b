"""A loss that is not finite costs the search the snapshot it came from, and nothing else."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_search import SMALL, batches, loss, same, search
from torch import Tensor

from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.result import NonFiniteSearch

# Training batches are handed out so: 6 in the warm-up (snapshots behind 2, 4 and 6), then 3 a meta-iteration.
FIRST_META = 6


class Faulty:
    """A loss that is NaN (or whose gradient is) while certain training batches are the last ones handed out."""

    def __init__(self, *bad: int, gradient: bool = False, layer: int | None = None) -> None:
        self.bad, self.gradient, self.layer, self.now = bad, gradient, layer, 0

    def event(self, handed: int) -> None:
        self.now = handed

    def __call__(self, block: int, output: Tensor, target: Tensor) -> Tensor:
        value = loss(block, output, target)
        if self.now not in self.bad or self.layer not in (None, block):
            return value
        # A norm at zero: the value is right, its derivative is NaN.
        return value + (output - output.detach()).pow(2).sum().sqrt() if self.gradient else value * math.nan


def run(faulty: Faulty, settings: Any = SMALL) -> Any:
    return search(settings, train=batches(event=faulty.event), local_loss=faulty)


@pytest.mark.parametrize(
    ("offset", "said"),
    [(1, "in the validation loss or its gradient"), (2, "base layer 1")],
    ids=["in the unrolled steps", "in the training step"],
)
def test_the_snapshot_is_dropped_and_the_search_goes_on_from_the_one_before(
    offset: int, said: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, list[Tensor]]] = []
    step = BilevelSearch._meta_iteration

    def watched(self: BilevelSearch, index: int) -> Any:
        before = [t.detach().clone() for t in self.variables.logits.tensors()]
        moments = [t.clone() for s in self.variables.adam.state.values() for t in s.values()]
        state, lr = self.store.take(index)
        weights = state.clone()
        self.store.put(index, state, lr)
        found = step(self, index)
        used.append((index, before))
        if found is None:  # nothing has changed: not alpha and beta, not Adam's moments, not the snapshot
            for old, new in zip(before, self.variables.logits.tensors(), strict=True):
                assert torch.equal(old, new)
            now = [t for s in self.variables.adam.state.values() for t in s.values()]
            assert len(now) == len(moments) > 0
            assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
            state, lr = self.store.take(index)
            for kind in ("params", "buffers", "momentum"):
                for old_d, new_d in zip(getattr(weights, kind), getattr(state, kind), strict=True):
                    assert all(torch.equal(old_d[n], new_d[n]) for n in old_d)
            self.store.put(index, state, lr)
        return found

    monkeypatch.setattr(BilevelSearch, "_meta_iteration", watched)
    fine = search()
    drawn = [index for index, _ in used]
    used.clear()
    fault = next(k for k in range(1, 5) if drawn[k] > 0)  # the meta-iteration to spoil: one with a snapshot before
    layer = 1 if offset == 2 else None
    with caplog.at_level(logging.WARNING):
        result = run(Faulty(FIRST_META + 3 * fault + offset, layer=layer))
    found = [index for index, _ in used]
    bad = drawn[fault]
    stands_in = [bad - 1 if k == bad else k for k in drawn[fault:]]
    assert found == [*drawn[: fault + 1], *stands_in]
    where = f"at meta-iteration {fault} (snapshot {bad}), {said}"
    assert result.failures == [{"where": where, "snapshot": bad}]
    assert where in caplog.text
    assert f"goes on from snapshot {bad - 1}" in caplog.text
    assert result.trajectory[:fault] == fine.trajectory[:fault]
    assert [p["step"] for p in result.trajectory] == [0, 1, 2, 3, 4]
    assert all(t.isfinite().all() for t in (result.alpha, *result.beta))
    assert not fine.failures


def test_a_gradient_that_is_not_finite_is_found_before_it_is_in_the_weights() -> None:
    result = run(Faulty(FIRST_META + 3 + 2, gradient=True, layer=1))
    assert "base layer 1, in a gradient" in result.failures[0]["where"]
    assert all(math.isfinite(p["val_loss"]) for p in result.trajectory)


def test_so_it_is_in_the_unrolled_steps() -> None:
    """The steps that the validation loss is differentiated through change no snapshot, but alpha and beta follow."""
    result = run(Faulty(FIRST_META + 3 + 1, gradient=True, layer=1))
    found = [failure["where"].partition("), ")[2] for failure in result.failures]
    assert found == ["in the validation loss or its gradient"]
    assert all(t.isfinite().all() for t in (result.alpha, *result.beta))
    assert [p["step"] for p in result.trajectory] == [0, 1, 2, 3, 4]


def test_a_warm_up_step_with_a_gradient_that_is_not_finite_moves_no_weight() -> None:
    result = run(Faulty(4, gradient=True, layer=2))
    assert result.failures == [{"where": "at warm-up step 4, base layer 2, in a gradient", "snapshot": None}]
    assert same(replace(result, failures=[]), replace(run(Faulty(4, layer=2)), failures=[]))


def test_without_one_before_the_next_one_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    step = BilevelSearch._meta_iteration

    def watched(self: BilevelSearch, index: int) -> Any:
        used.append(index)
        return step(self, index)

    monkeypatch.setattr(BilevelSearch, "_meta_iteration", watched)
    settings = replace(SMALL, meta_steps=12)
    search(settings)
    drawn, used[:] = used.copy(), []
    fault = drawn.index(0)
    result = run(Faulty(FIRST_META + 3 * fault + 1), settings)
    assert used == [*drawn[: fault + 1], *(max(1, k) for k in drawn[fault:])]
    assert [f["snapshot"] for f in result.failures] == [0]
    assert len(result.trajectory) == 12


def test_with_no_snapshot_left_it_ends_with_what_was_learned() -> None:
    fine = search()
    with pytest.raises(NonFiniteSearch, match=r"at meta-iteration 2 \(snapshot \d\), .*, the last of 3 snap") as caught:
        run(Faulty(*range(FIRST_META + 6, 1000)))
    so_far = caught.value.result
    assert so_far.trajectory == fine.trajectory[:2]
    assert [so_far.alpha.softmax(1)[:, 0].tolist()] == [fine.trajectory[1]["p_isolate"]]
    assert len(so_far.failures) == 3
    assert not so_far.interrupted


def test_a_warm_up_that_diverges_leaves_the_snapshots_so_far(caplog: pytest.LogCaptureFixture) -> None:
    result = run(Faulty(4, layer=2))
    assert result.failures == [{"where": "at warm-up step 4, base layer 2", "snapshot": None}]
    assert "going on with the 2 snapshots so far" in caplog.text
    assert len(result.trajectory) == 5
    assert same(result, run(Faulty(4, layer=2)))


def test_a_warm_up_that_diverges_before_the_first_snapshot_ends_the_search() -> None:
    with pytest.raises(NonFiniteSearch, match="at warm-up step 1, base layer 0, before the first snapshot") as caught:
        run(Faulty(1))
    assert torch.equal(caught.value.result.alpha, torch.zeros(3, 2))
