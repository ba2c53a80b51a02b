"""Alignment: inner products and cosines are those of gradients taken by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_conv import chain, loader, named, problem_of, stages_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from sedona_fx.rng import block_seed
from sedona_fx.search.trials.alignment import Alignment, measure
from sedona_fx.search.trials.supernet import Supernet

Stage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From the values that cross to those that cross next; the end of a stage is its value "h"."""


class Skip(nn.Module):
    """A skip connection that runs past the two cuts between its ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.b, self.c, self.d = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = torch.relu(self.b(a))
        c = torch.relu(self.c(b)) + a
        return self.out(torch.relu(self.d(c)).mean((2, 3)))

    def stages(self) -> list[tuple[Stage, list[nn.Parameter]]]:
        def first(v: dict[str, Tensor]) -> dict[str, Tensor]:
            a = torch.relu(self.a(v["h"]))
            return {"h": a, "a": a}

        return [
            (first, [*self.a.parameters()]),
            (lambda v: {**v, "h": torch.relu(self.b(v["h"]))}, [*self.b.parameters()]),
            (lambda v: {**v, "h": torch.relu(self.c(v["h"]))}, [*self.c.parameters()]),
            (
                lambda v: {"h": self.out(torch.relu(self.d(v["h"] + v["a"])).mean((2, 3)))},
                [*self.d.parameters(), *self.out.parameters()],
            ),
        ]


def chain_stages(model: nn.Sequential) -> list[tuple[Stage, list[nn.Parameter]]]:
    return [(lambda v, s=s: {"h": s(v["h"])}, [*s.parameters()]) for s in stages_of(model)]  # type: ignore[misc]


def case(name: str) -> tuple[nn.Module, list[tuple[Stage, list[nn.Parameter]]], dict[str, Any]]:
    if name == "skip":
        skip = Skip()
        return skip, skip.stages(), {"max_live": 2, "heads": ["linear", "tokens-1"]}
    model = chain()
    return model, chain_stages(model), {}


def supernet(model: nn.Module, blocks: int = 3, **more: Any) -> Supernet:
    problem = problem_of(model, blocks, **more)
    return Supernet(problem, problem.places(), torch.device("cpu"))


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return one vector; zeros where the loss does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def by_backpropagation(stages: Sequence[tuple[Stage, list[nn.Parameter]]], batch: tuple[Tensor, Tensor]) -> Tensor:
    values = {"h": batch[0]}
    for run, _ in stages:
        values = run(values)
    return gradients(cross_entropy(values["h"], batch[1]), [p for _, own in stages for p in own])


def cosines_by_hand(
    stages: Sequence[tuple[Stage, list[nn.Parameter]]],
    heads: Sequence[Sequence[nn.Module]],
    batch: tuple[Tensor, Tensor],
    truth: Tensor,
) -> np.ndarray:
    """Return, by place and head, the cosine between a head's gradient and `truth` over the weights before the cut."""
    rows = []
    for place in range(len(stages) - 1):
        values = {"h": batch[0]}
        for run, _ in stages[: place + 1]:
            values = run(values)
        before = [p for _, own in stages[: place + 1] for p in own]
        part = truth[: sum(p.numel() for p in before)]
        losses = [cross_entropy(head(values["h"]), batch[1]) for head in heads[place]]
        local = [gradients(loss, before) for loss in losses]
        rows.append([(g @ part / (g.norm() * part.norm())).item() for g in local])
    return np.array(rows)


@pytest.mark.parametrize("name", ["chain", "skip"])
def test_products_squares_and_truth_are_those_of_gradients_by_hand(name: str) -> None:
    model, stages, more = case(name)
    net = supernet(model, **more)
    assert len(net.places) == len(stages) - 1 == 3
    heads, batch = copy.deepcopy(net.heads), loader(seed=4)[0]
    inputs = named(batch, "x" if name == "skip" else "input")
    found = measure(net, inputs)
    assert found.products.shape == found.squares.shape == (3, 2, 4)
    truth = by_backpropagation(stages, batch)
    sizes = [sum(p.numel() for p in own) for _, own in stages]
    parts = truth.split(sizes)
    assert found.truth == pytest.approx([t.square().sum().item() for t in parts], rel=1e-12)
    assert all(value > 0 for value in found.truth)
    for place in range(3):
        for head in range(2):
            values = {"h": batch[0]}
            for run, _ in stages[: place + 1]:
                values = run(values)
            loss = cross_entropy(heads[place][head](values["h"]), batch[1])
            local = gradients(loss, [p for _, own in stages for p in own]).split(sizes)
            for stretch in range(4):
                square, product = local[stretch].square().sum().item(), (local[stretch] @ parts[stretch]).item()
                assert (square > 0) == (stretch <= place)
                assert found.squares[place, head, stretch] == pytest.approx(square, rel=1e-12)
                error = abs(found.products[place, head, stretch] - product)
                assert error <= 1e-12 * (square * found.truth[stretch]) ** 0.5


@pytest.mark.parametrize("name", ["chain", "skip"])
def test_by_cut_is_the_cosine_over_all_weights_before_the_cut(name: str) -> None:
    model, stages, more = case(name)
    net = supernet(model, **more)
    heads, batch = copy.deepcopy(net.heads), loader(seed=4)[0]
    found = measure(net, named(batch, "x" if name == "skip" else "input")).by_cut()
    expected = cosines_by_hand(stages, heads, batch, by_backpropagation(stages, batch))
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(expected.round(12).flatten())) == expected.size


def test_all_gradients_are_of_one_forward_and_its_draws() -> None:
    model = chain(drop=0.4)
    net = supernet(model)
    heads, batch = copy.deepcopy(net.heads), loader(seed=4)[0]
    found = measure(net, named(batch))
    masks, values = [], batch[0]
    torch.manual_seed(block_seed(7, 0, 0))  # the draws of a net's first forward are those of (seed, 0, step)
    for stage in model[:-1]:
        h = torch.relu(stage[1](stage[0](values)))
        masks.append(dropout(torch.ones_like(h), 0.4))
        values = h * masks[-1]
    stages: list[tuple[Stage, list[nn.Parameter]]] = []
    for place, (stage, mask) in enumerate(zip(model[:-1], masks, strict=True)):
        top = model[-1] if place == len(masks) - 1 else nn.Identity()

        def run(v: dict[str, Tensor], s: Any = stage, m: Tensor = mask, t: nn.Module = top) -> dict[str, Tensor]:
            return {"h": t(torch.relu(s[1](s[0](v["h"]))) * m)}

        stages.append((run, [*stage.parameters(), *top.parameters()]))
    truth = by_backpropagation(stages, batch)
    assert found.by_cut() == pytest.approx(cosines_by_hand(stages, heads, batch, truth), abs=1e-12)
    again = measure(net, named(batch))
    assert not torch.allclose(torch.from_numpy(found.truth), torch.from_numpy(again.truth))  # other draws, and heads


class Tied(nn.Module):
    """Words in and words out, by one matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.out.weight = self.embed.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(self.embed(x))))))))


def word_loss(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), target.flatten())


def test_a_weight_that_is_used_twice_counts_with_its_last_user_alone() -> None:
    model = Tied()
    g = torch.Generator().manual_seed(0)
    data = [(torch.randint(9, (4, 5), generator=g), torch.randint(9, (4, 5), generator=g)) for _ in range(4)]
    net = supernet(model, data=data, loss=word_loss, heads=["logits-1", "logits-2"])
    stretches = net.stretches()
    tied = [p for stretch in stretches for p in stretch if p.shape == model.embed.weight.shape]
    assert len(tied) == 1
    assert any(p is tied[0] for p in stretches[-1])
    assert sum(p is tied[0] for p in net.parameters()) == 1
    assert [sum(p.numel() for p in stretch) for stretch in stretches] == [0, 42, 42 + 42 + 54]
    heads, (x, y) = copy.deepcopy(net.heads), data[0]
    found = measure(net, named((x, y), "x"))
    truth = gradients(word_loss(model(x), y), [model.embed.weight, *model.b.parameters(), *model.c.parameters()])
    assert found.truth[0] == 0
    assert found.truth[-1] == pytest.approx(truth.square().sum().item(), rel=1e-12)  # of both uses
    local = gradients(word_loss(heads[1][0](torch.tanh(model.a(model.embed(x)))), y), [*model.a.parameters()])
    assert found.squares[1, 0].sum() == pytest.approx(local.square().sum().item(), rel=1e-12)


def test_a_gradient_that_is_nought_scores_nought() -> None:
    nothing = torch.zeros(2, 1, 3, dtype=torch.float64).numpy()
    truth = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).numpy()
    found = Alignment(nothing, nothing, truth)
    assert found.by_cut().tolist() == [[0.0], [0.0]]


def test_the_net_is_a_copy_and_measuring_changes_no_weight() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    net = supernet(model)
    weights = [p.detach().clone() for p in net.parameters()]
    measure(net, named(loader()[0]))
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
