"""What other threads do while a forward is recorded is no part of it, and goes on undisturbed."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.train import Greedy

LAYER = nn.Linear(2, 2)  # made here, since initial weights are drawn from the global generator
MODEL = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)).eval()
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Elsewhere:
    """Another thread, which does something and waits in the middle of it while the body runs."""

    def __init__(self, work):
        self.work, self.arrived, self.leave, self.errors = work, threading.Event(), threading.Event(), []

    def run(self):
        try:
            self.work(self)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.arrived.set()

    def pause(self):
        self.arrived.set()
        assert self.leave.wait(60)

    def __enter__(self):
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.arrived.wait(60)

    def __exit__(self, *_):
        self.leave.set()
        self.thread.join()
        assert not self.errors, self.errors


def no_grad(elsewhere):
    with torch.no_grad():
        elsewhere.pause()


def inference(elsewhere):
    with torch.inference_mode():
        elsewhere.pause()
        assert torch.ones(1).is_inference()


def autocast(elsewhere):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        elsewhere.pause()
        assert torch.is_autocast_enabled("cpu")
        assert LAYER(torch.ones(1, 2)).dtype is torch.bfloat16


def a_model(elsewhere):
    model = copy.deepcopy(MODEL)
    assert model(torch.ones(3, 2)).shape == (3, 2)
    elsewhere.pause()
    model(torch.ones(3, 2)).sum().backward()
    assert model[0].weight.grad.shape == (2, 2)


def hooks(elsewhere):
    calls = []
    model, x = copy.deepcopy(LAYER), torch.ones(1, 2)
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.weight.register_hook(lambda _: calls.append("backward"))
    elsewhere.pause()
    y = model(x)
    y.register_hook(lambda _: calls.append("tensor"))
    y.sum().backward()
    assert sorted(calls) == ["backward", "forward", "tensor"]


class Model(nn.Module):
    def __init__(self, work, symbolic):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.work, self.symbolic = work, symbolic

    def forward(self, x):
        if not self.symbolic and x.shape[1] != 6:
            raise ValueError
        h = torch.tanh(self.a(x))
        with Elsewhere(self.work):
            h = torch.tanh(self.b(h))
        return self.c(h)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("work", [no_grad, inference, autocast, a_model, hooks])
def test_is_not_recorded(work, symbolic):
    model = Model(work, symbolic)
    net = sedona_fx.decouple(model, (X, Y), cuts=["a", "b"] if symbolic else [":tanh"], progress=False)
    assert net.plan.capture.front_end == ("symbolic" if symbolic else "export")
    whole = sedona_fx.decouple(model, (X, Y), blocks=1, progress=False)
    whole.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    for (name, ours), theirs in zip(whole.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3)]
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layers(x))


def test_a_net_trains_beside_a_thread_that_decouples():
    model = Dropping()

    def decoupled():
        return sedona_fx.decouple(model, (X, Y), blocks=3, search="balanced", heads="linear", progress=False)

    def train(net):
        schedule = Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1), autocast=torch.bfloat16)
        for _ in range(8):
            schedule.step(X, Y)
            with torch.no_grad():
                net(X)

    nets, made, errors = [decoupled() for _ in range(2)], [], []
    train(nets[0])
    stop = threading.Event()

    def decouple_again():
        try:
            while not stop.is_set():
                made.append(decoupled())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=decouple_again)
    thread.start()
    try:
        train(nets[1])
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
    assert made
    for alone, beside in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(alone, beside)
    for net in made:
        assert net.plan == nets[0].plan
        torch.testing.assert_close(copy.deepcopy(net).eval()(X), copy.deepcopy(made[0]).eval()(X), rtol=0, atol=0)
