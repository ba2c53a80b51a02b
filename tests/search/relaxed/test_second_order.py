"""Short second derivatives against PyTorch's own, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.search.relaxed.second_order import ShortSecondDerivatives


def derivatives(f: Callable[..., Tensor], given: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """The value, all first derivatives, and for cotangents of those in `wanted` the derivatives of the first ones."""
    y = f(*given)
    first = torch.autograd.grad(y.pow(3).sum(), list(given), create_graph=True)
    cotangents = [first[k].detach().sin() for k in wanted]
    second = torch.autograd.grad([first[k] for k in wanted], list(given), cotangents)
    return [y, *first, *second]


def compare(f: Callable[..., Tensor], given: Sequence[Tensor], name: str, *, ours: bool = True) -> None:
    for wanted in (range(len(given)), *([k] for k in range(len(given)))):
        theirs = derivatives(f, given, wanted)
        with ShortSecondDerivatives():
            got = derivatives(f, given, wanted)
        assert (name in type(got[0].grad_fn).__name__) == ours
        for a, b in zip(got, theirs, strict=True):
            assert (a - b).norm() <= 1e-12 * b.norm()


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation", "bias"),
    [(1, 1, 1, 1, True), (1, 2, 0, 1, False), (4, 2, 1, 1, True), (2, (1, 2), (0, 1), 2, False)],
)
def test_convolution(groups, stride, padding, dilation, bias):
    torch.manual_seed(0)
    given = [leaf(3, 4, 7, 6), leaf(8, 4 // groups, 3, 3), *([leaf(8)] if bias else [])]
    compare(lambda x, w, b=None: F.conv2d(x, w, b, stride, padding, dilation, groups), given, "_Convolution")


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (7, 4), (3, 4, 5)])
def test_batch_norm(shape):
    torch.manual_seed(0)
    given = [leaf(*shape), leaf(4), leaf(4)]
    compare(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True, eps=0.1), given, "_Norm")


def test_running_statistics_and_modules():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    with ShortSecondDerivatives():
        got = nets[0](x)
    assert torch.equal(got, nets[1](x))
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_covered_runs_as_ever():
    torch.manual_seed(0)
    statistics = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    frozen = [leaf(5, 4, 3, 2), leaf(4), leaf(4)]
    compare(lambda x, w, b: F.batch_norm(x, *statistics, w, b), frozen, "_Norm", ours=False)
    named = [leaf(3, 4, 7, 6), leaf(8, 4, 3, 3)]
    compare(lambda x, w: F.conv2d(x, w, padding="same"), named, "_Convolution", ours=False)
    with ShortSecondDerivatives(), pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(leaf(1, 4), None, None, training=True)
    with ShortSecondDerivatives(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.conv2d(torch.randn(1, 2, 4, 4), torch.randn(3, 2, 1, 1)).dtype == torch.bfloat16


def test_a_third_derivative_is_refused_and_not_wrong():
    x, w = leaf(1, 2, 3, 3), leaf(2, 2, 2, 2)
    with ShortSecondDerivatives():
        (first,) = torch.autograd.grad(F.conv2d(x, w).pow(4).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice, not three times"):
        torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)
