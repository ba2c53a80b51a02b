"""Several seeds: every run is the search's own, and the plan that wins is the best on what no run saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sedona_fx
from sedona_fx.errors import DataError, SearchDivergedError
from sedona_fx.search import BestOf, Decision, Problem, Search, Sedona, Uniform

Data = list[tuple[torch.Tensor, torch.Tensor]]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(a, 8, 3, padding=1), nn.ReLU()) for a in (3, 8, 8, 8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def batches(count: int, seed: int) -> Data:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 6, 6, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(count)]


@dataclass
class ByHand(Search):
    """Cuts by seed; notes what it was given."""

    cuts: dict[int, list[str]]
    heads: dict[int, Any] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    needs_data: ClassVar[bool] = True

    def decide(self, problem: Problem) -> Decision:
        assert problem.data is not None
        self.seen.append([target for _, target in problem.data.val()])
        return Decision(self.cuts[problem.seed], [self.heads.get(problem.seed, "linear")], {"search": "by hand"})


def best(search: Any, data: Any = None, heads: Any = ("linear", "mlp"), **options: Any) -> Any:
    settings = {"seeds": 3, "steps": 12, "held_out": 0.5} | options
    return sedona_fx.decouple(
        net(), data or batches(4, 1), val_data=batches(4, 2), blocks=2, heads=list(heads),
        search=BestOf(search=search, **settings), seed=5, progress=False,
    ).plan  # fmt: skip


def held_out_loss(cut: int, data: Data, judges: Data) -> float:
    """Plain PyTorch: two blocks, each by its own loss, the first by a linear head on its pooled activation."""
    model = net()
    blocks = [nn.Sequential(*list(model)[: cut + 1]), nn.Sequential(*list(model)[cut + 1 :])]  # type: ignore[call-overload]
    torch.manual_seed(5)
    plan = sedona_fx.Plan(cuts=(str(cut),), heads=("linear",))
    head = sedona_fx.decouple(net(), data[0], plan=plan, seed=5).blocks[0].head
    assert head is not None
    parts = [[*blocks[0].parameters(), *head.parameters()], list(blocks[1].parameters())]
    optimizers = [torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4) for p in parts]
    for step in range(12):
        x, y = data[step % 4]
        h = blocks[0](x)
        for optimizer, loss in zip(
            optimizers, (F.cross_entropy(head(h), y), F.cross_entropy(blocks[1](h.detach()), y)), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return sum(F.cross_entropy(blocks[1](blocks[0](x)), y).item() for x, y in judges) / len(judges)


def test_the_winner_is_the_best_of_the_distinct_plans_on_batches_that_no_run_saw() -> None:
    search = ByHand({5: ["0"], 6: ["2"], 7: ["0"]})
    plan = best(search)
    targets = [y for _, y in batches(4, 2)]
    assert len(search.seen) == 3
    for seen in search.seen:
        assert len(seen) == 2
        assert all(torch.equal(a, b) for a, b in zip(seen, targets[:2], strict=True))
    losses = {cut: held_out_loss(int(cut), batches(4, 1), batches(4, 2)[2:]) for cut in ("0", "2")}
    found = plan.provenance["seeds"]
    assert [(run["seed"], run["cuts"], run["heads"]) for run in found["runs"]] == [
        (5, ["0"], ["linear"]), (6, ["2"], ["linear"]), (7, ["0"], ["linear"])
    ]  # fmt: skip
    for run in found["runs"]:
        assert run["held_out_loss"] == pytest.approx(losses[run["cuts"][0]], rel=1e-4)
    assert plan.cuts == (min(losses, key=lambda cut: losses[cut]),)
    assert found["cut_by"] == {"0": 2, "2": 1}
    assert (found["distinct_plans"], found["held_out_batches"]) == (2, 2)
    assert plan.provenance["search"] == "by hand"


def test_any_search_will_do_and_runs_have_folders_of_their_own(tmp_path: Path) -> None:
    assert best(Uniform(), steps=None).provenance["seeds"]["distinct_plans"] == 1
    search = Sedona(warmup_steps=2, meta_steps=2, snapshots=1, unroll=1, folder=tmp_path)
    stream = torch.get_rng_state()
    first = best(search, seeds=2)
    assert torch.equal(stream, torch.get_rng_state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed-5", "seed-6"]
    assert best(search, seeds=2) == first
    assert first.provenance["search"] == "sedona"
    assert BestOf(search=Sedona.paper()).val_batch_size == 1024


def test_data_in_an_order_of_its_own_gives_the_same_scores_again() -> None:
    own = torch.Generator().manual_seed(3)
    x, y = (torch.cat(parts) for parts in zip(*batches(4, 1), strict=True))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=own)
    first = best(ByHand({5: ["0"], 6: ["2"], 7: ["0"]}), data)
    torch.rand(3, generator=own)
    assert best(ByHand({5: ["0"], 6: ["2"], 7: ["0"]}), data) == first


class Nan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def diverging(context: sedona_fx.HeadContext) -> nn.Module:
    """A head whose loss is not a number."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(context.channels, 3), Nan())


def test_a_run_whose_plan_failed_has_no_loss() -> None:
    search = ByHand({5: ["0"], 6: ["2"]}, heads={5: diverging})
    plan = best(search, heads=["linear", diverging], seeds=2, steps=2)
    assert (plan.cuts, plan.heads) == (("2",), ("linear",))
    failed, won = plan.provenance["seeds"]["runs"]
    assert failed["held_out_loss"] is None
    assert won["held_out_loss"] > 0
    assert sedona_fx.Plan.from_json(plan.to_json()) == plan
    assert "Infinity" not in plan.to_json()
    with pytest.raises(SearchDivergedError, match="in the plans of all seeds"):
        best(ByHand({5: ["0"]}, heads={5: diverging}), heads=[diverging], seeds=1, steps=2)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: BestOf(search=Uniform(), seeds=0), ValueError, "at least one seed"),
        (lambda: BestOf(search=Uniform(), held_out=1.0), ValueError, "between 0 and 1"),
        (lambda: BestOf(search="uniform"), ValueError, r"search='uniform'\): hand a configured search such as Guided"),  # type: ignore[arg-type]
        (lambda: BestOf(search=Uniform), ValueError, "hand a configured search"),  # type: ignore[arg-type]
        (
            lambda: sedona_fx.decouple(
                net(), batches(2, 1), val_data=batches(1, 2), blocks=2, search=BestOf(search=Uniform()), progress=False
            ),
            DataError,
            "there are 1 in all",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
