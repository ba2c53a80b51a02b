"""A relaxed step that samples cuts: its mean over all samples, exactly, against the formula written out."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sedona_fx
from sedona_fx.errors import SettingsError
from sedona_fx.search import Decision, Problem, Search
from sedona_fx.search.relaxed.hypergradient import hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State
from sedona_fx.search.relaxed.training_step import RelaxedGradients, relaxed_gradients, sample_cuts
from sedona_fx.search.sedona.relaxed_net import RelaxedGraphBlock as Block
from sedona_fx.search.sedona.relaxed_net import relaxed_blocks

CUTS, WIDTH, CLASSES = 4, 5, 3


class Layer(nn.Module):
    """A linear base layer with one head, or the classifier; counts how often its head ran."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.w, self.last = nn.Parameter(torch.randn(WIDTH, CLASSES if last else WIDTH)), last
        self.runs = 0
        if not last:
            self.head, self.mix = nn.Parameter(torch.randn(WIDTH, CLASSES)), nn.Parameter(torch.zeros(1))
            self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if self.last:
            return (), x @ self.w
        h = torch.tanh(x @ self.w)
        self.runs += 1
        self.seen.add_(1)
        return (h,), h @ self.head


class Trunk(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.w = layer.w

    def forward(self, x: Tensor) -> Any:
        return (torch.tanh(x @ self.w),), None


def make(trunks: bool) -> tuple[list[Block], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [Layer(i == CUTS).double() for i in range(CUTS + 1)]
    blocks = [
        Block(layer, layer, (f"h{i - 1}" if i else "x",), (), None, None)
        if i == CUTS
        else Block(
            *(layer, layer, (f"h{i - 1}" if i else "x",), (f"h{i}",), f"h{i}", "mix"),
            Trunk(layer) if trunks else None,
        )
        for i, layer in enumerate(layers)
    ]
    alpha = torch.randn(CUTS, 2, dtype=torch.float64)
    return blocks, alpha, torch.randn(6, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (6,))


def formula(blocks: list[Block], alpha: Tensor, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every base layer (of its Lt) and of every head (of its l), by plain autograd."""
    w = [b.module.w.detach().requires_grad_() for b in blocks]
    heads = [b.module.head.detach().requires_grad_() for b in blocks[:-1]]
    losses, h = [], x
    for i in range(CUTS):
        h = torch.tanh(h @ w[i])
        losses.append(F.cross_entropy(h @ heads[i], y))
    relaxed = [F.cross_entropy(h @ w[-1], y)]
    for i in reversed(range(CUTS)):
        isolate, through = alpha[i].softmax(0)
        relaxed.insert(0, isolate * losses[i] + through * relaxed[0])
    base = [torch.autograd.grad(loss, t, retain_graph=True)[0] for loss, t in zip(relaxed, w, strict=True)]
    return base, [torch.autograd.grad(loss, t, retain_graph=True)[0] for loss, t in zip(losses, heads, strict=True)]


def loss(index: int, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def step(
    blocks: list[Block], state: State, alpha: Tensor, x: Tensor, y: Tensor, sampled: dict[int, float]
) -> RelaxedGradients:
    logits = Logits(alpha, [torch.zeros(1, dtype=torch.float64)] * CUTS)
    batch = {"x": x}, y
    return relaxed_gradients(RelaxedNet(blocks, loss), state, logits, batch, create_graph=False, sampled=sampled)


@pytest.mark.parametrize("trunks", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_base_layers_are_right_on_average_and_heads_train_when_drawn(count: int, trunks: bool) -> None:
    blocks, alpha, x, y = make(trunks)
    base, heads = formula(blocks, alpha, x, y)
    sets = list(combinations(range(CUTS), count))
    means = [torch.zeros_like(t) for t in base]
    for drawn in sets:
        state = State.of(blocks)
        for block in blocks:
            block.module.runs = 0
        found = step(blocks, state, alpha, x, y, dict.fromkeys(drawn, CUTS / count))
        assert len(found.losses) == count + 1
        for i, grads in enumerate(found.grads):
            means[i] += grads["w"] / len(sets)
            assert ("head" in grads) == (i in drawn)
            if i in drawn:
                torch.testing.assert_close(grads["head"], heads[i], rtol=1e-12, atol=1e-14)
        if trunks:
            assert [b.module.runs for b in blocks] == [int(i in drawn) for i in range(CUTS + 1)]
            assert [float(d["seen"]) for d in state.buffers[:-1]] == [float(i in drawn) for i in range(CUTS)]
    for ours, theirs in zip(means, base, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_without_the_weights_it_would_be_off() -> None:
    blocks, alpha, x, y = make(True)
    base, _ = formula(blocks, alpha, x, y)
    mean = sum(step(blocks, State.of(blocks), alpha, x, y, {i: 1.0}).grads[0]["w"] for i in range(CUTS)) / CUTS
    assert (mean - base[0]).norm() > 0.1 * base[0].norm()


class Kept(Exception):
    pass


def compiled() -> tuple[list[Block], str, Tensor, Tensor]:
    """The relaxed blocks of a net with dropout, the name of its input, and a batch."""
    torch.manual_seed(0)

    def layer(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout(0.3))

    model = nn.Sequential(layer(3, 8), layer(8, 8), layer(8, 8), nn.Flatten(), nn.Linear(8 * 36, 4)).double()
    x, y = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.randint(4, (6,))
    kept = []

    class Keep(Search):
        needs_data = True

        def decide(self, problem: Problem) -> Decision:
            kept.append(problem)
            raise Kept

    with pytest.raises(Kept):
        sedona_fx.decouple(model, [(x, y), (x, y)], search=Keep(), heads=["sedona-1", "sedona-3"])
    (name,) = (str(n.target) for n in kept[0].train.graph.nodes if n.op == "placeholder")
    return relaxed_blocks(kept[0], kept[0].places()), name, x, y


def test_the_trunk_of_a_compiled_net_is_its_net_without_heads() -> None:
    """On a net with dropout: what a block hands on is the same, and nothing of a head is run or updated."""
    blocks, name, x, y = compiled()
    assert all(b.trunk is not None for b in blocks[:-1])
    cuts, state = len(blocks) - 1, State.of(blocks)
    logits = Logits(torch.randn(cuts, 2, dtype=torch.float64), [torch.zeros(2, dtype=torch.float64)] * cuts)
    net, batch = RelaxedNet(blocks, loss), ({name: x}, y)
    # No head draws: the streams of the base layers are the same with and without them.
    found = []
    for sampled in (dict.fromkeys(range(cuts), 0.0), {}):
        torch.manual_seed(1)
        found.append(relaxed_gradients(net, state.clone(), logits, batch, create_graph=False, sampled=sampled).grads)
    for i, (every, none) in enumerate(zip(*found, strict=True)):
        base = {n for n in every if "mixture" not in n}
        assert none.keys() == base
        assert (base < every.keys()) == (i < cuts)
        for n in base:
            torch.testing.assert_close(none[n], every[n], rtol=1e-12, atol=1e-15)


def test_on_a_compiled_net_with_dropout_one_step_equals_reverse_mode() -> None:
    blocks, name, x, y = compiled()
    cuts, state = len(blocks) - 1, State.of(blocks)
    logits = Logits(torch.randn(cuts, 2, dtype=torch.float64), [torch.zeros(2, dtype=torch.float64)] * cuts)
    net, batch, sgd = RelaxedNet(blocks, loss), ({name: x}, y), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    torch.manual_seed(1)
    wanted = hypergradient(net, state, logits, [batch], batch, **sgd)
    torch.manual_seed(1)
    got = one_step_hypergradient(net, state, logits, batch, batch, **sgd)
    torch.testing.assert_close(got.alpha_grad, wanted.alpha_grad, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(got.beta_grads, wanted.beta_grads, rtol=1e-11, atol=1e-14)
    assert got.alpha_grad.abs().max() > 1e-6
    assert max(grad.abs().max() for grad in got.beta_grads) > 1e-6


def test_every_set_of_cuts_is_as_likely() -> None:
    draws = torch.Generator().manual_seed(0)
    drawn = [sample_cuts(5, 2, draws) for _ in range(4000)]
    assert all(list(d.values()) == [2.5, 2.5] and list(d) == sorted(d) for d in drawn)
    counts = {pair: sum(tuple(d) == pair for d in drawn) for pair in combinations(range(5), 2)}
    assert all(abs(n - 400) < 5 * 19 for n in counts.values())  # five standard deviations
    assert sample_cuts(3, 3) == {0: 1.0, 1: 1.0, 2: 1.0}
    for count in (0, 6):
        with pytest.raises(SettingsError, match="of 5 cuts"):
            sample_cuts(5, count)
