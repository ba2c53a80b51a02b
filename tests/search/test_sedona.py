"""The search on a net of four tiny base layers: the same under a seed, interruptible, within its cost."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.search import sedona
from sedona_fx.search.budget import RelaxedWork, share
from sedona_fx.search.decode import decode
from sedona_fx.search.relaxation import RelaxedGraphBlock as Block
from sedona_fx.search.sedona import NonFiniteSearch, Sedona, SedonaResult

RELEASED = Path(__file__).parents[2] / "../shared/data/sedona_released.json"
WORK = RelaxedWork(net=4.0, heads=2.0, validation=8.0)
SMALL = Sedona(warmup_steps=6, meta_steps=5, snapshots=3, unroll=2)
Batch = tuple[dict[str, Any], Tensor]


class Layer(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), last
        if last:
            self.out = nn.Linear(6, 3)
        else:
            self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))])
            self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        h = F.dropout(F.relu(self.norm(self.fc(x))), 0.2, self.training)
        if self.last:
            return (), self.out(h)
        s = self.mix.softmax(0)
        return (h,), s[0] * self.heads[0](h) + s[1] * self.heads[1](h)


def make_blocks() -> list[Block]:
    torch.manual_seed(0)
    blocks = []
    for i in range(4):
        layer, below = Layer(i == 3), f"h{i - 1}" if i else "x"
        blocks.append(
            Block(layer, layer, (below,), (), None, None)
            if i == 3
            else Block(layer, layer, (below,), (f"h{i}",), f"h{i}", "mix")
        )
    return blocks


def batches(count: int = 4, size: int = 8, event: Callable[[int], None] | None = None) -> Callable[[], Iterator[Batch]]:
    """Epochs of `count` batches in an order from the global stream; `event(n)` as the n-th of all is handed out."""
    g = torch.Generator().manual_seed(1)
    data = [({"x": torch.randn(size, 6, generator=g)}, torch.randint(3, (size,), generator=g)) for _ in range(count)]
    handed = 0

    def epoch() -> Iterator[Batch]:
        nonlocal handed
        for i in torch.randperm(count).tolist():
            if event is not None:
                event(handed)
            handed += 1
            yield data[i]

    return epoch


def loss(block: int, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def search(
    settings: Sedona = SMALL,
    seed: int = 0,
    train: Callable[[], Iterator[Batch]] | None = None,
    local_loss: Callable[[int, Any, Any], Tensor] = loss,
    blocks: list[Block] | None = None,
    progress: bool = False,
) -> SedonaResult:
    blocks = blocks or make_blocks()
    return settings.run(blocks, local_loss, train or batches(), batches(size=16), WORK, seed, progress)


def same(a: SedonaResult, b: SedonaResult) -> bool:
    tensors = zip([a.alpha, *a.beta], [b.alpha, *b.beta], strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and a.trajectory == b.trajectory


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
    monkeypatch.setattr(sedona, "_TRAJECTORY_POINTS", 4)
    r = search(replace(SMALL, meta_steps=10, unroll=1))
    assert [p["step"] for p in r.trajectory] == [0, 3, 6, 9]


def test_snapshots_are_spread_over_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, float]] = []

    class Watched(sedona._Snapshot):
        def __init__(self, state: Any, lr: float) -> None:
            super().__init__(state, lr)
            taken.append((int(state.buffers[0]["norm.num_batches_tracked"]), lr))

    monkeypatch.setattr(sedona, "_Snapshot", Watched)
    r = search(replace(SMALL, warmup_steps=20, snapshots=4, lr=0.1))
    assert [step for step, _ in taken] == [5, 10, 15, 20]
    rates = [lr for _, lr in taken]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx((0.1 + 0.001) / 2)
    assert rates[-1] == pytest.approx(0.001)
    assert r.cost["snapshot_bytes"] > 0


def test_batch_norm_of_a_snapshot_counts_one_update_a_meta_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    class Watched(sedona._Snapshot):
        def __init__(self, state: Any, lr: float) -> None:
            super().__init__(state, lr)
            held.append(state)

    monkeypatch.setattr(sedona, "_Snapshot", Watched)
    search()  # 6 warm-up steps, snapshots at 2, 4, 6, then 5 meta-iterations
    assert sum(int(s.buffers[0]["norm.num_batches_tracked"]) for s in held) == 2 + 4 + 6 + 5


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


@pytest.mark.parametrize(
    ("bad_call", "where"),
    [(4 * 2 + 1, "at warm-up step 2, base layer 1"), (6 * 4 + 8, "at meta-iteration 0, in the validation loss")],
)
def test_a_loss_that_is_not_finite(bad_call: int, where: str) -> None:
    calls = 0

    def local_loss(block: int, output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(block, output, target) * (math.nan if calls == bad_call + 1 else 1.0)

    with pytest.raises(NonFiniteSearch, match=where) as caught:
        search(local_loss=local_loss)
    assert torch.equal(caught.value.result.alpha, torch.zeros(3, 2))
    assert not caught.value.result.interrupted


@pytest.mark.parametrize("training_steps", [70, 333, 10_000])
@pytest.mark.parametrize("heads", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("given", [{}, {"warmup_steps": 3}, {"meta_steps": 1}])
def test_the_cost_is_within_the_training_steps(training_steps: int, heads: float, given: dict[str, int]) -> None:
    settings = {"warmup_steps": None, "meta_steps": None, "snapshots": None, "unroll": 1} | given
    work = RelaxedWork(1.0, heads, 2.0)
    b = share(training_steps, work, **settings)
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
        share(50, WORK, 3, 24, None, None)
    assert share(58, WORK, 3, 24, None, None).meta_steps == 1


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="single base layer"):
        search(blocks=make_blocks()[3:])
    with pytest.raises(ValueError, match="training data is empty"):
        search(train=lambda: iter(()))
    with pytest.raises(ValueError, match="unroll=0"):
        Sedona(unroll=0)


def test_the_papers_settings() -> None:
    s = Sedona.paper()
    b = share(s.training_steps, WORK, s.unroll, s.warmup_steps, s.meta_steps, s.snapshots)
    assert (b.warmup_steps, b.meta_steps, b.snapshots, s.unroll, s.lr) == (40_000, 2_000, 50, 5, 0.1)


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
