"""From a model to SEDONA's relaxed blocks and back: the search on compiled graphs, through ``decouple``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d
from torchvision.models import googlenet

import sedona_fx
from sedona_fx.errors import SearchDivergedError, SettingsError
from sedona_fx.ir.split_point import SplitPoint
from sedona_fx.passes import relax
from sedona_fx.search import Decision, Problem, Search, Sedona
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.sedona.relaxed_net import relaxed_blocks

SMALL = Sedona(warmup_steps=4, meta_steps=3, snapshots=2, unroll=1)


class Caught(Exception):
    pass


def problem_of(model: nn.Module, batch, heads) -> Problem:
    """The problem that ``decouple`` would hand to a search."""
    caught = []

    class Catch(Search):
        needs_data = True

        def decide(self, problem: Problem) -> Decision:
            caught.append(problem)
            raise Caught

    with pytest.raises(Caught):
        sedona_fx.decouple(model, [batch, batch], search=Catch(), heads=heads)
    return caught[0]


def conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate([(3, 8), (8, 8), (8, 12), (12, 12), (12, 16)]):
        layers.append(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=1 + k % 2), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def loader(count: int = 6):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(4, (6,), generator=g)) for _ in range(count)]


class UNet(nn.Module):
    """Two live tensors cross its middle cuts: the first encoder state is read by the last block."""

    def __init__(self) -> None:
        super().__init__()

        def conv(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))

        self.down, self.deep, self.middle, self.up = conv(3, 6), conv(6, 8), conv(8, 8), conv(16, 6)
        self.out = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.deep(max_pool2d(a, 2))
        c = self.middle(max_pool2d(b, 2))
        d = self.up(torch.cat([interpolate(c, scale_factor=2), b], 1))
        return self.out(torch.cat([interpolate(d, scale_factor=2), a], 1)).mean((2, 3))


class Tied(nn.Module):
    """A residual stream; the last layer is the embedding, and all steps share a norm and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.common = nn.Embedding(4, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.out = nn.Linear(8, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for step in self.steps:
            x = x + torch.tanh(self.common(torch.relu(step(self.norm(x)))))
        return self.out(x.mean(1))


@pytest.mark.parametrize("name", ["resnet", "googlenet", "unet", "tied"])
def test_relaxed_blocks_follow_the_relaxed_objective(name):
    """Their hand-combined gradients are those of one backward through the RELAXED graph's scaled edges."""
    torch.manual_seed(0)
    if name == "resnet":
        model, x = sedona_fx.models.resnet18(num_classes=4, width=0.125), torch.randn(4, 3, 16, 16)
    elif name == "unet":
        model, x = UNet(), torch.randn(4, 3, 8, 8)
    elif name == "tied":
        model, x = Tied(), torch.randint(4, (5, 6))
    else:  # auxiliary classifiers: branches that feed only training outputs
        model, x = googlenet(num_classes=4, init_weights=False, dropout=0.0, dropout_aux=0.0), torch.randn(2, 3, 64, 64)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y = torch.randint(4, (len(x),))
    candidates = ["linear", "linear" if name == "tied" else "sedona-1"]  # few read (batch, words, channels)
    problem = problem_of(model, (x, y), candidates)
    places = problem.places()
    blocks = relaxed_blocks(problem, places)
    alpha = torch.randn(len(places), 2, dtype=torch.float64)
    beta = [torch.randn(2, dtype=torch.float64) for _ in places]

    def local_loss(block, local, target):
        if block < len(places):
            return cross_entropy(local, target)
        return problem.analysed.output.final_loss(cross_entropy, local, target)

    inputs = {blocks[0].inputs[0]: x}
    state = State.of(blocks)
    net = RelaxedNet(blocks, local_loss)
    found = relaxed_gradients(net, state, Logits(alpha, beta), (inputs, y), create_graph=False)

    heads = [[b.module.get_submodule(f"sedona_split_points.{k}.mixture").heads[m] for m in range(2)]
             for k, b in enumerate(blocks[:-1])]  # fmt: skip
    gm = relax(problem.train, dict(zip(places, heads, strict=True)))
    for k in range(len(places)):
        point = gm.get_submodule(f"sedona_split_points.{k}")
        assert isinstance(point, SplitPoint)
        point.double()
        with torch.no_grad():
            point.alpha.copy_(alpha[k])
            point.mixture.beta.copy_(beta[k])
    *locals_, output = gm(x)
    total = sum(cross_entropy(local, y) for local in locals_) + problem.analysed.output.final_loss(
        cross_entropy, output, y
    )
    total.backward()
    assert len(found.losses) == len(places) + 1
    for k, block in enumerate(blocks):
        for key, p in block.module.named_parameters():
            if key != block.beta:
                holder, held = state.slots(state.params, k)[key]
                grad = found.grads[holder].get(held)
                assert (p.grad is None) == (grad is None), key
                if p.grad is not None:
                    # At deep layers gradients are sums of many terms: relative to the largest of them.
                    assert (p.grad - grad).norm() <= 1e-10 * p.grad.norm() + 1e-14, key
    assert any(state.borrowed) == (name == "tied")


def test_a_search_is_deterministic_and_leaves_the_weights_alone():
    torch.manual_seed(0)
    model = conv_net()
    stream = torch.get_rng_state()
    first = sedona_fx.decouple(model, loader(), blocks=3, search=SMALL, progress=False)
    assert torch.equal(stream, torch.get_rng_state())
    second = sedona_fx.decouple(model, loader(), blocks=3, search=SMALL, progress=False)
    assert first.plan == second.plan
    for ours, theirs in zip(first.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    found = first.plan.provenance
    assert len(found["trajectory"]) == 3
    assert found["candidates"][found["places"][0]] == ["sedona-1", "sedona-2", "sedona-3", "sedona-4"]
    assert sedona_fx.decouple(model, loader(), blocks=3, search=SMALL, progress=False, seed=1).plan != first.plan


def test_no_accelerator_is_seeded(monkeypatch):
    problem, seeded = problem_of(conv_net(), loader(1)[0], ["linear"]), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    SMALL.decide(problem)
    assert not seeded


def test_any_number_of_blocks_is_decoded_from_one_search():
    net = sedona_fx.decouple(conv_net(), loader(), blocks=3, search=SMALL, progress=False)
    found = net.plan.provenance
    alpha, beta = torch.tensor(found["alpha"]), [torch.tensor(b) for b in found["beta"]]
    cuts, heads = sedona_fx.search.decode(alpha, beta, 3)
    assert [found["places"][k] for k in cuts] == list(net.plan.cuts)
    assert [found["candidates"][found["places"][k]][m] for k, m in zip(cuts, heads, strict=True)] == list(
        net.plan.heads
    )
    assert len(sedona_fx.search.decode(alpha, beta, 4)[0]) == 3


def test_the_plan_says_what_was_learned_and_what_is_a_tie(caplog):
    """One meta-iteration of Adam moves every p by half a percent at most: within the tolerance, nothing is learned."""
    settings = Sedona(warmup_steps=2, meta_steps=1, snapshots=1, unroll=1)
    with caplog.at_level("INFO"):
        net = sedona_fx.decouple(
            conv_net(), loader(), blocks=3, heads=["sedona-1", "sedona-2"], search=settings, progress=False
        )
    found = net.plan.provenance
    assert found["learned"] == []
    assert found["ties"] == {"cuts": found["places"], "heads": {cut: ["sedona-1", "sedona-2"] for cut in net.plan.cuts}}
    assert found["failures"] == []
    assert f"SEDONA learned 0 of {len(found['places'])} p_isolate" in caplog.text
    assert f"Ties between cuts: {', '.join(found['places'])}; between heads: {net.plan.cuts[0]}: " in caplog.text

    settings = Sedona(warmup_steps=2, meta_steps=8, snapshots=1, unroll=1, meta_lr=1.0)
    found = sedona_fx.decouple(conv_net(), loader(), blocks=3, search=settings, progress=False).plan.provenance
    assert found["learned"] == found["places"]
    assert found["ties"]["cuts"] == []


def test_ctrl_c_gives_the_plan_so_far():
    class Interrupting(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for k, batch in enumerate(super().__iter__()):
                if self.passes > 6 and k == 1:
                    raise KeyboardInterrupt
                yield batch

    net = sedona_fx.decouple(
        conv_net(),
        Interrupting(loader(3)),
        val_data=loader(2),
        blocks=3,
        search=Sedona(warmup_steps=3, meta_steps=50, unroll=1),
        progress=False,
    )
    assert net.plan.provenance["interrupted"]
    assert len(net.plan.cuts) == 2
    assert net.losses(*loader()[0])


def test_a_loss_that_is_not_finite_keeps_the_plan_so_far():
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        return cross_entropy(output, target) * (math.nan if calls > 60 else 1.0)

    with pytest.raises(SearchDivergedError, match="not finite at meta-iteration") as caught:
        sedona_fx.decouple(
            conv_net(),
            loader(),
            blocks=3,
            loss=loss,
            search=Sedona(warmup_steps=2, meta_steps=50, unroll=1),
            progress=False,
        )
    plan = caught.value.plan
    assert plan is not None
    assert len(plan.cuts) == 2
    net = sedona_fx.decouple(conv_net(), loader()[0], plan=plan)
    assert net.plan.cuts == plan.cuts


def test_a_budget_too_small_says_what_would_do():
    with pytest.raises(SettingsError, match="Raise training_steps to"):
        sedona_fx.decouple(conv_net(), loader(), search=Sedona(training_steps=3), progress=False)
