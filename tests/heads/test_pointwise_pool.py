"""PointwisePool against the four layers it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sedona_fx.heads import pooled_relu
from sedona_fx.heads.layers import HeadBatchNorm
from sedona_fx.heads.pointwise_pool import PointwisePool
from sedona_fx.measure import peak_bytes


def pair(channels: int, features: int) -> tuple[PointwisePool, nn.Sequential]:
    fused = PointwisePool(channels, features, HeadBatchNorm(features))
    with torch.no_grad():
        fused.norm.weight.uniform_(0.5, 1.5)
        fused.norm.bias.normal_()
    plain = nn.Sequential(
        nn.Conv2d(channels, features, 1, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    plain[0].load_state_dict(fused.conv.state_dict())
    plain[1].load_state_dict(fused.norm.state_dict())
    return fused, plain


def derivatives(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and first and second derivatives with respect to the input and all parameters."""
    wanted = [x, *module.parameters()]
    y = module(x)
    first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), wanted)
    return [y, *first, *second]


@pytest.mark.parametrize("chunk", [10**6, 200], ids=["whole", "chunks"])
def test_it_equals_the_plain_layers(chunk, monkeypatch):
    monkeypatch.setattr(pooled_relu, "_CPU_ELEMENTS", chunk)
    torch.manual_seed(0)
    fused, plain = (m.double() for m in pair(3, 7))
    x = (3 + torch.randn(9, 3, 5, 5, dtype=torch.float64)).requires_grad_()
    for ours, theirs in zip(derivatives(fused, x), derivatives(plain, x), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
    for ours, theirs in zip(fused.norm.buffers(), plain[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    fused.eval(), plain.eval()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_it_never_holds_the_wide_activation():
    fused, plain = pair(4, 512)
    x = torch.randn(64, 4, 16, 16)
    for module in (fused, plain):
        module(x).sum().backward()
    wide = 64 * 512 * 16 * 16 * 4
    assert peak_bytes(lambda: plain(x).sum().backward()) > 2 * wide
    assert peak_bytes(lambda: fused(x).sum().backward()) < wide / 2


def test_under_autocast_the_statistics_stay_exact():
    fused, plain = pair(4, 32)
    x = 100 + torch.randn(16, 4, 8, 8)  # in bfloat16 the variance would drown
    expected = plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(x)
    torch.testing.assert_close(fused.norm.running_var, plain[1].running_var, rtol=1e-3, atol=1e-4)
    assert expected.isfinite().all()
