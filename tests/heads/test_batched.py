"""Heads run together against the same heads run one after the other, and the mixture against plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sedona_fx.heads.batched import run_together
from sedona_fx.heads.layers import HeadBatchNorm
from sedona_fx.heads.nets import cnn_head, linear_head, mlp_head, sedona_head
from sedona_fx.ir.split_point import MixedHead

CLASSES = 3


def ladder(channels: int, side: int, **more: int) -> list[nn.Module]:
    return [sedona_head(channels, (side, side), CLASSES, depth, features=12, **more) for depth in (1, 2, 3, 4)]


def hooked(channels: int) -> nn.Module:
    head = sedona_head(channels, (8, 8), CLASSES, 2, features=12)
    head[0].register_forward_hook(lambda module, args, out: 2 * out)
    return head


def frozen(channels: int) -> list[nn.Module]:
    heads = ladder(channels, 8)
    for head in heads:
        head[1].eval()
    return heads


def parted(channels: int) -> list[nn.Module]:
    """Heads that are alike stand apart, and one part of them parts again."""
    a, b, c, d = ladder(channels, 8)
    return [b, cnn_head(channels, (8, 8), CLASSES), d, a, linear_head(channels, CLASSES, channel_dim=1, rank=4), c]


KINDS = {
    "ladder": (lambda: ladder(8, 8), (6, 8, 8, 8)),
    "odd map": (lambda: ladder(8, 5), (6, 8, 5, 3)),
    "single place": (lambda: ladder(8, 1), (6, 8, 1, 1)),
    "two places": (lambda: ladder(8, 2), (6, 8, 2, 2)),
    "one sample": (lambda: ladder(8, 1), (1, 8, 1, 1)),
    "no expansion": (lambda: ladder(4, 8, expansion=1), (6, 4, 8, 8)),
    "parted": (lambda: parted(8), (6, 8, 8, 8)),
    "frozen norms": (lambda: frozen(8), (6, 8, 8, 8)),
    "a hook": (lambda: [*ladder(8, 8), hooked(8)], (6, 8, 8, 8)),
    "one head": (lambda: ladder(8, 8)[3:], (6, 8, 8, 8)),
    "vectors": (lambda: [sedona_head(8, (1, 1), CLASSES, d, features=12, vector=True) for d in (1, 3)], (6, 8)),
    "lines": (lambda: [sedona_head(8, (9,), CLASSES, d, features=12) for d in (2, 3)], (6, 8, 9)),
    "no sedona": (lambda: [mlp_head(8, (8, 8), CLASSES), mlp_head(8, (8, 8), CLASSES, spatial=3)], (6, 8, 8, 8)),
}


def make(kind: str) -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    heads = [head.double() for head in build()]
    for head in heads:
        for p in head.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
        for n, b in head.named_buffers():
            if "running" in n:
                b.add_(0.2 * torch.rand_like(b))
    return heads, torch.randn(shape, dtype=torch.float64, requires_grad=True)


def derivatives(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """The outputs, and first and second derivatives by everything in `wanted`."""
    total = torch.stack([(k + 1) * out.pow(3).sum() for k, out in enumerate(outputs)]).sum()
    first = torch.autograd.grad(total, wanted, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), wanted, allow_unused=True)
    return [*outputs, *first, *(torch.zeros_like(w) if g is None else g for g, w in zip(second, wanted, strict=True))]


@pytest.mark.parametrize("kind", KINDS)
def test_together_they_are_what_each_is_alone(kind: str) -> None:
    heads, x = make(kind)
    others = copy.deepcopy(heads)
    ours = derivatives(run_together(heads, x), [x, *(p for head in heads for p in head.parameters())])
    theirs = derivatives([head(x) for head in others], [x, *(p for head in others for p in head.parameters())])
    scale = max(t.norm().item() for t in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15 * scale
    for one, other in zip(heads, others, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_what_is_alike_is_one_operator() -> None:
    heads, x = make("ladder")
    with Convolutions() as together:
        run_together(heads, x)
    with Convolutions() as alone:
        for head in heads:
            head(x)
    # Two, and three for each inverted residual: of the deepest head, as the others' are alike.
    assert (together.count, alone.count) == (2 + 3 * 3, 4 * 2 + 3 * (0 + 1 + 2 + 3))


def test_in_evaluation_each_runs_by_itself() -> None:
    heads, x = make("ladder")
    mixture = MixedHead(heads).double().eval()
    with Convolutions() as counted:
        out = mixture(x)
    assert counted.count > 11
    torch.testing.assert_close(out, torch.stack([head(x) for head in heads]).mean(0), rtol=1e-13, atol=1e-13)


def test_the_mixture_against_layers_written_out() -> None:
    """Two heads of depth 1 in functional PyTorch, mixed by hand; gradients of all weights and of the activation."""
    torch.manual_seed(0)
    mixture = MixedHead([sedona_head(8, (6, 6), CLASSES, 1, features=5) for _ in range(2)]).double()
    with torch.no_grad():
        mixture.beta.copy_(torch.tensor([0.3, -0.4]))
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    w = dict(mixture.named_parameters())

    def norm(z: Tensor, name: str) -> Tensor:
        return F.batch_norm(z, None, None, w[name + ".weight"], w[name + ".bias"], training=True)

    outputs = []
    for n in ("heads.0.", "heads.1."):
        z = F.relu(norm(F.conv2d(x, w[n + "0.weight"]), n + "1"))
        z = F.relu(norm(F.conv2d(z, w[n + "3.weight"], stride=2, padding=1, groups=2), n + "4"))
        z = F.relu(norm(F.conv2d(z, w[n + "6.conv.weight"]), n + "6.norm")).mean((2, 3))
        outputs.append(F.linear(z, w[n + "7.weight"], w[n + "7.bias"]))
    share = w["beta"].softmax(0)
    wanted = [x, *w.values()]
    theirs = torch.autograd.grad((share[0] * outputs[0] + share[1] * outputs[1]).pow(2).sum(), wanted)
    ours = torch.autograd.grad(mixture(x).pow(2).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_two_heads_share_a_norm_by_running_together() -> None:
    """Running statistics are each head's own, also where a channel has a single value and none is updated."""
    norms = [HeadBatchNorm(2) for _ in range(2)]
    heads = [nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), norm, nn.ReLU()) for norm in norms]
    run_together(heads, torch.randn(5, 3, 4, 4))
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)
    before = [norm.running_mean.clone() for norm in norms]
    run_together(heads, torch.randn(1, 3, 1, 1))
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, norms, strict=True))
