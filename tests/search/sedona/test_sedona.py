"""The search on a net of four tiny base layers: the same under a seed, interruptible, within its cost."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_search import SMALL, WORK, Layer, batches, make_blocks, same, search
from torch import Tensor

from sedona_fx.errors import CutError, DataError
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.sedona import bilevel, sedona
from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.decode import decode
from sedona_fx.search.sedona.search_cost import share
from sedona_fx.search.sedona.sedona import Sedona
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.session.stream import Stream

RELEASED = Path(__file__).parents[3] / "../shared/data/sedona_released.json"


def test_the_same_seed_gives_the_same_search_and_leaves_everything_as_it_was() -> None:
    blocks = make_blocks()
    before = [t.clone() for b in blocks for t in b.module.state_dict().values()]
    stream = torch.get_rng_state()
    first = search(blocks=blocks)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(
        torch.equal(x, y)
        for x, y in zip(before, (t for b in blocks for t in b.module.state_dict().values()), strict=True)
    )
    assert all(m.training for b in blocks for m in b.module.modules())
    torch.manual_seed(123)  # the state of the user's stream does not matter
    assert same(first, search(blocks=blocks))
    assert not same(first, search(seed=1))
    assert first.alpha.shape == (3, 2)
    assert [b.shape for b in first.beta] == [(2,)] * 3
    assert first.alpha.abs().min() > 0
    assert not first.interrupted


def test_the_trajectory_tells_what_happened() -> None:
    r = search()
    assert [p["step"] for p in r.trajectory] == [0, 1, 2, 3, 4]
    last = r.trajectory[-1]
    assert last["p_isolate"] == r.alpha.softmax(1)[:, 0].tolist()
    assert last["head_weights"] == [b.softmax(0).tolist() for b in r.beta]
    assert all(math.isfinite(p["val_loss"]) for p in r.trajectory)


def test_the_trajectory_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel, "_TRAJECTORY_POINTS", 4)
    r = search(replace(SMALL, meta_steps=10, unroll=1))
    assert [p["step"] for p in r.trajectory] == [0, 3, 6, 9]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any, float]]:
    """What a search puts into its store: index, state, learning rate."""
    found: list[tuple[int, Any, float]] = []

    class Watched(SnapshotStore):
        def put(self, index: int, state: Any, lr: float) -> None:
            found.append((index, state.clone(), lr))
            super().put(index, state, lr)

    monkeypatch.setattr(sedona, "SnapshotStore", Watched)
    return found


def test_snapshots_are_spread_over_the_warm_up(put: list[tuple[int, Any, float]]) -> None:
    r = search(replace(SMALL, warmup_steps=20, snapshots=4, lr=0.1))
    taken = put[:4]
    assert [index for index, _, _ in taken] == [0, 1, 2, 3]
    assert [int(state.buffers[0]["norm.num_batches_tracked"]) for _, state, _ in taken] == [5, 10, 15, 20]
    rates = [lr for _, _, lr in taken]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx((0.1 + 0.001) / 2)
    assert rates[-1] == pytest.approx(0.001)
    assert r.cost["snapshot_bytes"] == sum(state.state_bytes for _, state, _ in taken)


def test_batch_norm_of_a_snapshot_counts_one_update_a_meta_iteration(put: list[tuple[int, Any, float]]) -> None:
    search()  # 6 warm-up steps, snapshots at 2, 4, 6, then 5 meta-iterations
    last = {index: state for index, state, _ in put}
    assert sum(int(s.buffers[0]["norm.num_batches_tracked"]) for s in last.values()) == 2 + 4 + 6 + 5


def test_the_warm_up_is_plain_training_at_one_half_and_its_snapshots_hold_all_of_it(
    put: list[tuple[int, Any, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha and beta are frozen there: by hand, with constants for them, PyTorch's own SGD ends at the same weights."""
    seen: list[tuple[Tensor, ...]] = []
    train = BilevelSearch._train

    def watched(self: BilevelSearch, *args: Any) -> None:
        if self.history.warmup_steps < 6:
            seen.append(tuple(t.detach().clone() for t in self.variables.logits.tensors()))
            assert not self.variables.adam.state
        train(self, *args)

    monkeypatch.setattr(BilevelSearch, "_train", watched)
    search(replace(SMALL, lr=0.1, weight_decay=0.01))
    assert len(seen) == 6
    assert all(not t.any() for ts in seen for t in ts)

    def half(h: Tensor) -> Tensor:  # hands half of the gradient on: first derivatives of this are right
        return 0.5 * h + 0.5 * h.detach()

    layers: list[Any] = [b.module for b in make_blocks()]
    params = [[p for n, p in layer.named_parameters() if n != "mix"] for layer in layers]
    sgd = torch.optim.SGD([p for ps in params for p in ps], lr=0.1, momentum=0.9, weight_decay=0.01)
    stream = Stream(batches(), "training", 0)
    torch.manual_seed(0)
    for step in range(6):
        sgd.param_groups[0]["lr"] = 0.001 + 0.099 * (1 + math.cos(math.pi * step / 6)) / 2
        inputs, target = next(stream)
        h, total = inputs["x"], torch.zeros(())
        for layer in layers:
            h = F.dropout(F.relu(layer.norm(layer.fc(h))), 0.2)
            if layer.last:
                total = total + F.cross_entropy(layer.out(h), target)
            else:
                total = total + F.cross_entropy((layer.heads[0](half(h)) + layer.heads[1](half(h))) / 2, target)
                h = half(h)
        sgd.zero_grad()
        total.backward()
        sgd.step()
        if step + 1 in (2, 4, 6):
            _, state, _ = put[(step + 1) // 2 - 1]
            for k, layer in enumerate(layers):
                assert isinstance(layer, Layer)
                for name, t in layer.named_parameters():
                    if name != "mix":
                        torch.testing.assert_close(state.params[k][name], t.detach(), rtol=1e-4, atol=1e-6)
                        kept = sgd.state[t]["momentum_buffer"]
                        torch.testing.assert_close(state.momentum[k][name], kept, rtol=1e-4, atol=1e-6)
                for name, t in layer.named_buffers():
                    torch.testing.assert_close(state.buffers[k][name], t, rtol=1e-4, atol=1e-6)


def test_entropies_are_those_of_the_softmax(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        r = search()
    last = r.trajectory[-1]
    by_hand = [-sum(p * math.log(p) for p in (q, 1 - q)) for q in last["p_isolate"]]
    assert last["entropy_alpha"] == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    by_hand = [-sum(p * math.log(p) for p in weights) for weights in last["head_weights"]]
    assert last["entropy_beta"] == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    assert f"entropy_alpha {last['entropy_alpha']:.4f}" in caplog.text


@pytest.mark.parametrize(("at", "points"), [(0, 0), (3, 0), (6 + 3 + 1, 1), (6 + 3 + 2, 1)])
def test_ctrl_c_returns_what_was_learned(at: int, points: int, caplog: pytest.LogCaptureFixture) -> None:
    def event(n: int) -> None:
        if n == at:
            raise KeyboardInterrupt

    blocks = make_blocks()
    stream = torch.get_rng_state()
    r = search(train=batches(event=event), blocks=blocks)
    assert r.interrupted
    assert len(r.trajectory) == points
    assert "interrupted at " + ("warm-up step" if at < 6 else "meta-iteration 1") in caplog.text
    assert torch.equal(stream, torch.get_rng_state())
    whole = search()
    assert r.trajectory == whole.trajectory[:points]
    assert r.cost["spent_steps"] < whole.cost["spent_steps"] == pytest.approx(whole.cost["equivalent_steps"])
    assert decode(r.alpha, r.beta, 2)


def test_ctrl_c_while_counting_the_data() -> None:
    def event(n: int) -> None:
        raise KeyboardInterrupt

    r = search(Sedona(), train=batches(event=event))
    assert r.interrupted
    assert r.cost == {"spent_steps": 0.0}


@pytest.mark.parametrize("training_steps", [70, 333, 10_000])
@pytest.mark.parametrize("heads", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("given", [{}, {"warmup_steps": 3}, {"meta_steps": 1}])
def test_the_cost_is_within_the_training_steps(training_steps: int, heads: float, given: dict[str, int]) -> None:
    b = share(Sedona(training_steps=training_steps, unroll=1, **given), RelaxedWork(1.0, heads, 2.0))
    assert training_steps - b.meta_cost - b.relaxed_cost < b.equivalent_steps <= training_steps
    assert 1 <= b.snapshots <= b.warmup_steps


def test_the_default_is_a_hundred_epochs_and_what_is_said_is_what_is_done(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    with caplog.at_level(logging.INFO):
        r = search(Sedona(), train=batches(count=1, event=seen.append), progress=True)
    assert r.cost["equivalent_steps"] <= 100
    assert r.cost["spent_steps"] == pytest.approx(r.cost["equivalent_steps"])
    assert r.cost["relaxed_steps"] == 33 + 2
    assert r.cost["meta_iterations"] == 2
    said = "SEDONA: 35 relaxed steps + 2 meta-iterations = 92 training steps"
    assert said in caplog.text
    assert said in capsys.readouterr().err
    assert len(seen) == 1 + 33 + 2 * (3 + 1)  # counted once, then trained on


def test_a_budget_too_small_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="Raise training_steps to 43 or more"):
        search(Sedona(training_steps=10))
    search(Sedona(training_steps=43))
    with pytest.raises(ValueError, match="Raise training_steps to 58 or more"):
        share(Sedona(training_steps=50, unroll=3, warmup_steps=24), WORK)
    assert share(Sedona(training_steps=58, unroll=3, warmup_steps=24), WORK).meta_steps == 1


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(CutError, match="single base layer"):
        search(blocks=make_blocks()[3:])
    with pytest.raises(DataError, match="training data is empty"):
        search(train=lambda: iter(()))
    with pytest.raises(ValueError, match="unroll=0"):
        Sedona(unroll=0)


def test_the_papers_settings() -> None:
    s = Sedona.paper()
    b = share(s, WORK)
    assert (b.warmup_steps, b.meta_steps, b.snapshots, s.unroll, s.lr) == (40_000, 2_000, 50, 5, 0.1)
    assert (s.momentum, s.weight_decay, s.val_batch_size) == (0.9, 1e-4, 1024)
    assert (s.meta_lr, s.meta_betas, s.meta_weight_decay) == (1e-2, (0.5, 0.999), 1e-6)


def test_the_papers_label_smoothing() -> None:
    """0.1 spread over the other 9 classes is what PyTorch calls 0.111, up to the target's own share."""
    assert "label_smoothing=0.111" in (Sedona.paper.__doc__ or "")
    logits, target = torch.randn(5, 10), torch.randint(10, (5,))
    spread = torch.full((5, 10), 0.1 / 9).scatter(1, target[:, None], 0.9)
    by_hand = -(spread * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, target, label_smoothing=1 / 9), by_hand)


@pytest.mark.parametrize(
    ("net", "cuts", "depths"), [("vgg19", [5, 12, 13], [4, 1, 1]), ("resnet50", [9, 10, 11], [4, 4, 4])]
)
def test_decoding_the_released_variables_gives_the_released_decisions(
    net: str, cuts: list[int], depths: list[int]
) -> None:
    if not RELEASED.exists():
        pytest.skip("the variables released by SEDONA's authors are not at hand (sedona_released.json)")
    plan = json.loads(RELEASED.read_text())["plans"][net]
    found, heads = decode(torch.tensor(plan["alpha"]), [torch.tensor(b) for b in plan["beta"]], blocks=4)
    assert found == cuts
    assert [h + 1 for h in heads] == depths


def test_decoding_breaks_ties_towards_the_front_and_does_not_saturate() -> None:
    alpha = torch.tensor([[0.0, 0.0], [50.0, -50.0], [0.0, 0.0], [60.0, -60.0]])  # two p_isolate that round to 1
    beta = [torch.zeros(3)] * 3 + [torch.tensor([0.0, 2.0, 2.0])]
    assert decode(alpha, beta, 1) == ([], [])
    assert decode(alpha, beta, 2) == ([3], [1])
    assert decode(alpha, beta, 4) == ([0, 1, 3], [0, 0, 1])
    assert decode(alpha, beta, 5)[0] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 base layers make 1 to 5 blocks, not 6"):
        decode(alpha, beta, 6)
