"""Models that do not have the batch in dimension 0 from end to end, against PyTorch with detach written by hand."""

import copy

import pytest
import torch
from layouts import (
    KINDS,
    DeepSet,
    EachStep,
    EachStepFirst,
    Frames,
    InputsStepsFirst,
    Siamese,
    StepsFirst,
    made,
    pair_of,
)
from torch import Tensor, nn

import sedona_fx


def assert_gradients_by_hand(kind: type, model: nn.Module, net: sedona_fx.Net) -> None:
    """Compare losses and gradients of a net with those of its heads on a copy of the model."""
    model, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    wanted = [kind.loss(output, kind.target) for output in model.outputs_by_hand(heads, *kind.inputs)]
    sum(wanted).backward()
    net.zero_grad()
    result = net.backward(*pair_of(kind))
    torch.testing.assert_close(result.losses, [loss.detach() for loss in wanted], rtol=1e-12, atol=0)
    pairs = [(p, net.model.get_parameter(name)) for name, p in model.named_parameters()]
    pairs += list(zip(heads.parameters(), net.heads.parameters(), strict=True))
    for ours, parameter in pairs:
        assert (ours.grad is None) == (parameter.grad is None)
        if ours.grad is not None:
            assert (parameter.grad - ours.grad).norm() <= 1e-11 * ours.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_heads_that_see_examples(kind):
    model, net = made(kind)
    assert torch.equal(net(*kind.inputs), model(*kind.inputs))
    assert_gradients_by_hand(kind, model, net)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_net_comes_back(kind, tmp_path):
    """It is traced with noise, and zeros for tokens."""
    model, net = made(kind)
    net.save(tmp_path)
    torch.manual_seed(1)
    again = sedona_fx.load(tmp_path, kind().double(), loss=kind.loss)
    assert [repr(head) for head in again.heads.values()] == [repr(head) for head in net.heads.values()]
    assert_gradients_by_hand(kind, model, again)


def twice(kind: type) -> tuple[object, Tensor]:
    """Return the inputs and the target with every example twice, the second time next to the first."""
    inputs = [x.repeat_interleave(2, 1 if kind is InputsStepsFirst else 0) for x in kind.inputs]
    rows, steps_first = len(kind.target) // 4, kind is EachStepFirst
    target = kind.target.view(-1, 4) if steps_first else kind.target.view(-1, max(rows, 1))
    return tuple(inputs) if len(inputs) > 1 else inputs[0], target.repeat_interleave(2, int(steps_first)).flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_another_size(kind):
    """Every example twice: the mean of the losses is what it was."""
    _, net = made(kind)
    torch.testing.assert_close(net.losses(*twice(kind)), net.losses(*pair_of(kind)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [StepsFirst, Siamese, Frames])
def test_a_greedy_step_is_that_of_the_gradients(kind):
    _, net = made(kind)
    net.backward(*pair_of(kind))
    wanted = {name: p.detach() - 0.1 * p.grad for name, p in net.model.named_parameters() if p.grad is not None}
    net.zero_grad()
    sedona_fx.train.Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(*pair_of(kind))
    for name, value in wanted.items():
        torch.testing.assert_close(net.model.get_parameter(name).detach(), value, rtol=1e-10, atol=1e-13)


def test_a_search_cuts_between_the_layers_that_have_the_steps_first():
    _, net = made(StepsFirst, cuts=None, blocks=4, search="balanced")
    assert list(net.plan.cuts) == ["l.0", "l.1", "l.3"]
    assert set(net.plan.base_layers) >= {f"l.{k}" for k in range(5)}


@pytest.mark.parametrize(
    "search", [sedona_fx.search.Guided(training_steps=8), sedona_fx.search.Rollout(steps=4)], ids=["guided", "rollout"]
)
def test_searches_that_train(search):
    pair = pair_of(StepsFirst)
    net = sedona_fx.decouple(StepsFirst(), [pair, pair, pair], blocks=3, search=search, progress=False)
    assert len(net.plan.cuts) == 2
    assert net.backward(*pair).losses[0].isfinite()


def captured(kind: type) -> type:
    """Return a kind whose forward branches on a size, so that ``torch.export`` records it."""

    class Captured(kind):
        def forward(self, x):
            if x.shape[-1] < 1:
                raise ValueError("nothing to do")
            return super().forward(x)

    class TwoCaptured(kind):
        def forward(self, a, b):
            if a.shape[-1] < 1:
                raise ValueError("nothing to do")
            return super().forward(a, b)

    return Captured if len(kind.inputs) == 1 else TwoCaptured


@pytest.mark.parametrize("kind", [StepsFirst, Siamese, DeepSet, EachStep, Frames])
def test_so_in_captured_programs(kind):
    cuts = {StepsFirst: [f"l.{k}" for k in range(5)], Frames: [":relu", ":relu#2"]}.get(kind, ["l.0", "l.2"])
    model, net = made(captured(kind), cuts=cuts)
    assert net.capture.front_end == "export"
    assert_gradients_by_hand(kind, model, net)
