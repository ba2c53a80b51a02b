"""A plan's fields are state, its provenance is history: nothing depends on history, and old state does not stick."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import sedona_fx
from sedona_fx import Limits, Plan
from sedona_fx.errors import DataError
from sedona_fx.plan_values import Capture
from sedona_fx.train import Greedy


class Branching(nn.Module):
    """Asks for a value if told to: then only its body can be recorded, and the rest runs as Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)) for _ in range(4)))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and x.mean() > 100:
            x = x / 2
        return self.out(self.body(x))


class Sized(Branching):
    """Looks at the type of what it is given: only torch.export can record it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * float(len(x.shape))) if bool(x.shape[1] == 6) else x


def batch(seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def made(model: nn.Module, **options: object) -> sedona_fx.Net:
    torch.manual_seed(0)
    return sedona_fx.decouple(model, batch(), blocks=3, search="balanced", seed=5, **options)  # type: ignore[arg-type]


def losses(net: sedona_fx.Net, steps: int = 3) -> list[Tensor]:
    schedule = Greedy(net, lambda params: torch.optim.SGD(params, lr=0.1))
    return [loss for step in range(steps) for loss in schedule.step(*batch(step)).losses]


def test_a_plan_found_on_a_host_does_not_make_another_net_run_as_python(tmp_path):
    hosted = made(Branching(asks=True), root="body", heads=["linear"])
    assert hosted.plan.capture == Capture(hosted=True)
    traceable = Branching(asks=False)
    net = sedona_fx.decouple(traceable, batch(), plan=hosted.plan)
    assert net.plan.capture == Capture()
    assert net.to_onnx(tmp_path / "net.onnx").exists()


def test_a_plan_found_by_export_does_not_fix_the_sizes_of_a_net_that_is_traced():
    captured = made(Sized(asks=False))
    assert captured.plan.capture == Capture("export")
    net = sedona_fx.decouple(Branching(asks=False), batch(), plan=dataclasses.replace(captured.plan, seed=1))
    assert net.plan.capture == Capture()
    assert net.plan.seed == 0  # the call's, as it draws the heads


@pytest.mark.parametrize("model", [Branching, Sized])
def test_without_its_provenance_a_plan_works_the_same(tmp_path, model):
    model = model(asks=False)
    net = made(model)
    net.save(tmp_path / "with")
    first, weights = losses(net), net.state_dict()
    bare = dataclasses.replace(net.plan, provenance={})
    again = sedona_fx.decouple(model, batch(), plan=bare, seed=5)
    assert all(map(torch.equal, losses(again), first))
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    bare.save(tmp_path / "with" / "plan.json")
    loaded = sedona_fx.load(tmp_path / "with", model)
    assert dataclasses.replace(loaded.plan, provenance={}) == bare
    assert all(map(torch.equal, losses(loaded), first))
    if net.plan.capture.fixed_sizes:
        wide = torch.randn(4, 7)
        with pytest.raises(DataError, match=r"captured by torch.export with \(any, 6\): its dimension 1 has to be 6"):
            loaded(wide)


def test_measured_seconds_are_state_too():
    net = made(Branching(asks=False), budget=Limits(block_seconds=60.0), heads=["linear"])
    assert "measured" not in net.plan.provenance["budget"]
    bare = Plan.from_json(dataclasses.replace(net.plan, provenance={}).to_json())
    again = sedona_fx.decouple(Branching(asks=False), batch(), plan=bare, budget=Limits(block_seconds=60.0))
    assert again.plan.block_seconds == net.plan.block_seconds
    assert again.plan.provenance["plan_costs"] == net.plan.provenance["plan_costs"]


def test_a_saved_plan_says_nothing_about_state_in_its_provenance(tmp_path):
    made(Branching(asks=True), root="body", heads=["linear"]).save(tmp_path)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["capture"]["hosted"] is True
    assert not written["provenance"].keys() & {"seed", "front_end", "free_batch", "host", "left_out"}
