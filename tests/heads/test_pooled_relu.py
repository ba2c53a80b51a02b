"""pooled_relu against the formula in plain PyTorch: value, first and second derivatives, pieces, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sedona_fx.heads import pooled_relu as module
from sedona_fx.heads.pooled_relu import pooled_relu
from sedona_fx.measure import peak_bytes

SHAPES = {"maps": (5, 9, 3, 7), "one place": (6, 1, 4, 5), "one example": (1, 8, 2, 3)}


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x @ weight.t() + bias).relu().mean(1)


def leaves(count: int, size: int, channels: int, features: int) -> list[Tensor]:
    shapes = [(count, size, channels), (features, channels), (features,)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("elements", [2**18, 20], ids=["whole", "pieces"])
@pytest.mark.parametrize("kind", SHAPES)
def test_derivatives(kind, elements, monkeypatch):
    monkeypatch.setattr(module, "_CPU_ELEMENTS", elements)
    torch.manual_seed(0)
    given = leaves(*SHAPES[kind])
    for wanted in ([0, 1, 2], [0], [1], [2]):
        found = []
        for f in (pooled_relu, formula):
            y = f(*given)
            first = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
            cotangents = [first[k].detach().cos() for k in wanted]
            second = torch.autograd.grad([first[k] for k in wanted], given, cotangents)
            found.append([y, *first, *second])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_only_what_is_wanted_is_computed():
    x, weight, bias = leaves(3, 4, 2, 5)
    expected = torch.autograd.grad(formula(x, weight, bias).sum(), [weight])
    got = torch.autograd.grad(pooled_relu(x.detach(), weight, bias.detach()).sum(), [weight])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_nothing_wide_is_kept_or_held():
    x, weight, bias = (t.float().detach().requires_grad_() for t in leaves(256, 64, 4, 256))
    wide = 256 * 64 * 256 * 4

    def twice() -> None:
        (first,) = torch.autograd.grad(pooled_relu(x, weight, bias).pow(2).sum(), [weight], create_graph=True)
        torch.autograd.grad(first.pow(2).sum(), [x, weight, bias])

    assert peak_bytes(twice) < wide / 2
