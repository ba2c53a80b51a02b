"""Targets that a part of the forward computes under no_grad: every local loss gets them, as the model's own does."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import DataError
from sedona_fx.train import BackLink, Delayed, Greedy, Replay

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(6)


@dataclass
class Views:
    prediction: Tensor
    target: Tensor


class Bootstrap(nn.Module):
    """Predicts what a momentum encoder makes of another view."""

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.wrap = wrap
        self.online = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        self.momentum, self.predict = copy.deepcopy(self.online), nn.Linear(4, 4)
        self.double()

    def target(self, x):
        with torch.no_grad():
            return self.momentum(x.flip(1))

    def forward(self, x):
        return self.wrap(self.predict(self.online(x)), self.target(x))


class Captured(Bootstrap):
    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError("four features")
        return super().forward(x)


class Averaging(Captured):
    """Moves the momentum encoder in forward."""

    def target(self, x):
        with torch.no_grad():
            for ours, theirs in zip(self.momentum.parameters(), self.online.parameters(), strict=True):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
        return super().target(x)


WRAPS = {
    "dict": lambda p, t: {"prediction": p, "target": t},
    "tuple": lambda p, t: (p, t),
    "list": lambda p, t: [p, t],
    "dataclass": Views,
}


def loss(output, _):
    if isinstance(output, Views):
        output = (output.prediction, output.target)
    prediction, target = output.values() if isinstance(output, dict) else output
    return 2 - 2 * F.cosine_similarity(prediction, target).mean()


def made(model, **options):
    options = {"cuts": ["online.0", "online.1"], "heads": "linear", **options}
    return sedona_fx.decouple(model, (X, Y), loss=loss, **options)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [*((Bootstrap, wrap) for wrap in WRAPS), (Captured, "dict"), (Averaging, "dict"), (Averaging, "tuple")],
)
def test_blocks_are_those_by_hand(kind, wrap, tmp_path):
    model = kind(WRAPS[wrap])
    net = made(model)
    one = sedona_fx.decouple(model, (X, Y), blocks=1, loss=loss)
    twin, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    expected = loss(twin(X), Y)
    expected.backward()
    assert torch.equal(one.backward(X, Y).losses[0], expected)
    assert gradients(one.model).keys() == gradients(twin).keys()
    assert all(torch.equal(g, gradients(twin)[name]) for name, g in gradients(one.model).items())
    assert all(map(torch.equal, one.model.parameters(), twin.parameters()))

    twin = copy.deepcopy(model)
    target, h, losses = twin.target(X), X, []
    for k in range(2):
        h = twin.online[k](h.detach())
        losses.append(loss((heads[str(k)](h), target), Y))
    losses.append(loss((twin.predict(twin.online[2](h.detach())), target), Y))
    sum(losses).backward()
    found = net.backward(X, Y).losses
    torch.testing.assert_close(torch.stack(found), torch.stack(losses).detach())
    assert gradients(net.model).keys() == gradients(twin).keys()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=1e-14, msg=name)
    assert all(map(torch.equal, net.model.parameters(), twin.parameters()))  # moved once, if at all

    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, kind(WRAPS[wrap]), loss=loss, data=(X, Y))
    torch.testing.assert_close(torch.stack(again.losses(X, Y)), torch.stack(net.losses(X, Y)))
    assert len(copy.deepcopy(net).losses(X, Y)) == 3


@pytest.mark.parametrize("schedule", [Greedy, BackLink, Replay, Delayed])
def test_schedules(schedule):
    net = made(Bootstrap(WRAPS["dict"]), **({"heads": False} if schedule is Delayed else {}))
    options = {"capacity": 2} if schedule is Replay else {}
    training = schedule(net, lambda parameters: torch.optim.SGD(parameters, lr=0.5), **options)
    first = [float(x) for x in training.step(X, Y).losses]
    for _ in range(20):
        last = [float(x) for x in training.step(X, Y).losses]
    assert last[-1] < first[-1] or first[-1] != first[-1]


@pytest.mark.parametrize("search", ["balanced", "uniform", "latest"])
def test_rules_choose_cuts(search):
    net = made(Bootstrap(WRAPS["dict"]), cuts=None, heads=None, blocks=3, search=search)
    assert all(cut.startswith("online.") for cut in net.plan.cuts)
    assert len(net.backward(X, Y).losses) == 3


def test_searches_that_compare_heads_are_refused():
    with pytest.raises(DataError, match=r"reads 'target' of the output, which a search that compares heads does"):
        made(Bootstrap(WRAPS["dict"]), cuts=None, heads=None, blocks=2, search="rollout")


class Siamese(Bootstrap):
    """The target is the net's own output: earlier blocks cannot have it."""

    def target(self, x):
        return self.online(x.flip(1)).detach()


class CapturedSiamese(Captured, Siamese):
    pass


@pytest.mark.parametrize("kind", [Siamese, CapturedSiamese])
def test_a_target_that_needs_the_net_itself_is_refused(kind):
    with pytest.raises(DataError, match=r"reads 'target' of the output, which no head gives.*if it is a target, comp"):
        made(kind(WRAPS["dict"]))
    assert len(made(kind(WRAPS["dict"]), heads=False).blocks) == 3
