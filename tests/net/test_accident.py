"""Backpropagation by accident: one warning, where a backward pass through net(x) really trains, and nowhere else."""

import warnings

import pytest
import torch
from small import Chain, batch, make_net, sgd
from torch.nn import functional as F

import sedona_fx
from sedona_fx.train import Backprop, Greedy, evaluate

X, Y = batch()
WARNING = r"trains no head.*net\.backward\(x, y\).*Greedy\(net.*Backprop.*eval mode or under torch\.no_grad\(\)"


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_one_warning_a_net():
    net = make_net()
    with pytest.warns(UserWarning, match=WARNING) as told:
        F.cross_entropy(net(X), Y).backward()
    assert len(told) == 1
    assert all(p.grad is None for p in net.heads.parameters())
    silent(lambda: F.cross_entropy(net(X), Y).backward())
    other = make_net()
    with pytest.warns(UserWarning, match="through all 4 blocks"):
        F.cross_entropy(other.call((X,)), Y).backward()


def test_the_gradients_are_as_before():
    net, plain = make_net(), make_net().model
    with pytest.warns(UserWarning, match=WARNING):
        F.cross_entropy(net(X), Y).backward()
    F.cross_entropy(plain(X), Y).backward()
    for parameter, own in zip(net.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, own.grad)


def test_other_uses_are_silent():
    net = make_net()
    with torch.no_grad():
        silent(lambda: net(X))
    silent(lambda: net(X))  # no backward pass
    silent(lambda: torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.model.parameters())))
    x = X.clone().requires_grad_()
    silent(lambda: torch.autograd.grad(net(x).sum(), x))
    silent(lambda: net(x).sum().backward(inputs=[x]))
    for call in (
        lambda: net.backward(X, Y),
        lambda: Greedy(net, sgd).step(X, Y),
        lambda: Backprop(net, sgd).step(X, Y),
    ):
        silent(call)
    silent(lambda: sum(net.losses(X, Y)).backward())
    silent(lambda: evaluate(net, [(X, Y)]))
    silent(lambda: F.cross_entropy(net.eval()(X), Y).backward())


@pytest.mark.parametrize("how", [{"blocks": 1}, {"cuts": ["stages.1"], "heads": False}], ids=["K = 1", "no heads"])
def test_nets_without_heads_are_silent(how):
    net = sedona_fx.decouple(Chain().double(), (X, Y), **how)
    silent(lambda: F.cross_entropy(net(X), Y).backward())


def test_outputs_of_other_types():
    class Pair(Chain):
        def forward(self, x):
            out = super().forward(x)
            return {"logits": out, "loss": out.square().mean()}

    net = make_net(Pair, loss=lambda out, y: F.cross_entropy(out["logits"], y))
    with pytest.warns(UserWarning, match=WARNING):
        net(X)["loss"].backward()


def test_frozen_models_are_silent():
    net = make_net()
    net.model.requires_grad_(False)
    x = X.clone().requires_grad_()
    silent(lambda: net(x).sum().backward())
