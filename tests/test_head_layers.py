"""The nets behind the heads against the papers: layers, channels, strides."""

from __future__ import annotations

import pytest
import torch
import torch.fx
from torch import nn

from sedona_fx.head_layers import HeadBatchNorm, InvertedResidual, Mean, ResidualMLP
from sedona_fx.heads import HeadContext, build_head
from sedona_fx.pointwise_pool import PointwisePool


def image(channels: int, height: int, width: int | None = None, classes: int = 10) -> HeadContext:
    return HeadContext((8, channels, height, width or height), (8, classes), 1, "layer2.0")


def facts(head: nn.Module) -> list[str]:
    """One short text a layer: what is compared with the paper."""
    out: list[str] = []
    for module in head.modules():
        match module:
            case nn.Conv2d():
                kind = "dw" if module.groups == module.in_channels > 1 else "conv"
                assert module.bias is None
                assert module.padding == (module.kernel_size[0] // 2,) * 2
                sizes = f"{module.in_channels}>{module.out_channels}"
                out.append(f"{kind}{module.kernel_size[0]} {sizes} /{module.stride[0]}")
            case nn.Linear():
                out.append(f"linear {module.in_features}>{module.out_features}")
            case HeadBatchNorm():
                out.append(f"bn {module.num_features}")
            case nn.ReLU():
                out.append("relu")
            case PointwisePool():  # its convolution and norm follow
                out.append("pointwise pool")
            case nn.AdaptiveAvgPool2d():
                out.append(f"pool {module.output_size}")
            case nn.LayerNorm():
                out.append(f"norm {module.normalized_shape[0]}")
            case Mean():
                out.append(f"mean {module.dims}")
    return out


def conv(text: str) -> list[str]:
    """A convolution with BatchNorm and ReLU behind it."""
    outgoing = text.split(">")[1].split(" ")[0]
    return [text, f"bn {outgoing}", "relu"]


def inverted_residual(text: str, stride: int) -> list[str]:
    incoming, outgoing = text.split(">")
    hidden = 4 * int(incoming)
    expand, depthwise = conv(f"conv1 {incoming}>{hidden} /1"), conv(f"dw3 {hidden}>{hidden} /{stride}")
    return [*expand, *depthwise, f"conv1 {hidden}>{outgoing} /1", f"bn {outgoing}"]


def test_sedona_3_on_64_channels_of_8x8():
    assert facts(build_head("sedona-3", image(64, 8))) == [
        *conv("conv1 64>16 /1"),
        *conv("dw3 16>16 /2"),
        *inverted_residual("16>16", 1),
        *inverted_residual("16>24", 2),
        *["pointwise pool", "conv1 24>512 /1", "bn 512"],
        "linear 512>10",
    ]


@pytest.mark.parametrize(
    ("height", "strides", "channels"),
    [
        (1, [1, 1, 1], [16, 16, 16]),
        (2, [1, 1, 1], [16, 16, 16]),
        (3, [1, 2, 1], [16, 24, 24]),
        (4, [1, 2, 1], [16, 24, 24]),
        (8, [1, 2, 1], [16, 24, 24]),
    ],
)
def test_sedona_strides_only_while_the_map_is_two_wide(height, strides, channels):
    head = build_head("sedona-4", image(64, height))
    blocks = [m for m in head if isinstance(m, InvertedResidual)]
    assert head[3].stride == (2, 2)
    assert [next(m.stride[0] for m in b.modules() if isinstance(m, nn.Conv2d) and m.groups > 1) for b in blocks] == (
        strides
    )
    assert [b.branch[-1].num_features for b in blocks] == channels
    assert [b.residual for b in blocks] == [stride == 1 for stride in strides]


def test_sedona_heads_of_every_depth_differ_by_one_inverted_residual():
    for form, features in (("sedona", 512), ("sedona-wide", 2048), ("sedona-basic", 512)):
        for depth in range(1, 5):
            head = build_head(f"{form}-{depth}", image(32, 8))
            assert sum(isinstance(m, InvertedResidual) for m in head) == depth - 1
            assert head[-1].in_features == features


def test_the_basic_form_keeps_the_channels_and_does_not_expand():
    assert facts(build_head("sedona-basic-3", image(32, 8))) == [
        *conv("conv1 32>32 /1"),
        *conv("dw3 32>32 /2"),
        *conv("dw3 32>32 /1"),
        "conv1 32>32 /1",
        "bn 32",
        *conv("dw3 32>32 /2"),
        "conv1 32>64 /1",
        "bn 64",
        *["pointwise pool", "conv1 64>512 /1", "bn 512"],
        "linear 512>10",
    ]


MLP = ["pool 2", *(["linear 64>64", "bn 64", "relu"] * 3), "linear 64>10"]


@pytest.mark.parametrize(
    ("name", "height", "expected"),
    [
        ("mlp", 32, ["pool (8, 8)", *MLP]),
        ("mlp", 3, ["pool (1, 1)", *MLP]),
        ("mlp-sr", 32, ["pool (8, 8)", *(conv("conv1 16>16 /1") * 3), *MLP]),
        ("mlp-sr", 7, ["pool (2, 2)", *(conv("conv1 16>16 /1") * 3), *MLP]),
        ("cnn", 8, [*(conv("conv3 16>16 /1") * 2), "pool 2", "bn 16", "linear 64>10"]),
    ],
)
def test_dgl_heads(name, height, expected):
    assert facts(build_head(name, image(16, height))) == expected


def test_dgl_repeats_a_map_of_one_pixel_up_to_2x2():
    head = build_head("mlp", image(3, 4))
    flat = head[:3](torch.randn(2, 3, 4, 4)).view(2, 3, 4)
    assert torch.equal(flat, flat[..., :1].expand_as(flat))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_token_heads(depth):
    head = build_head(f"tokens-{depth}", HeadContext((2, 7, 6), (2, 10), channel_dim=-1))
    mlp = ["norm 6", "linear 6>6", "linear 6>6"]
    assert facts(head) == ["norm 6", *(mlp * (depth - 1)), "mean (1,)", "linear 6>10"]
    assert sum(isinstance(m, ResidualMLP) for m in head) == depth - 1


@pytest.mark.parametrize(
    ("shape", "channel_dim", "others"),
    [((2, 5, 4, 3), 1, (2, 3)), ((2, 4, 3, 5), -1, (1, 2)), ((2, 7, 5), 2, (1,)), ((2, 5, 7, 3, 2), 1, (2, 3, 4))],
)
def test_linear_is_the_mean_and_a_matrix(shape, channel_dim, others):
    head = build_head("linear", HeadContext(shape, (2, 10), channel_dim))
    x = torch.randn(shape)
    torch.testing.assert_close(head(x), nn.functional.linear(x.mean(others), head[-1].weight, head[-1].bias))


def test_token_heads_do_not_mind_where_the_channels_are():
    first, last = (
        build_head("tokens-2", HeadContext(s, (2, 10), d)).eval() for s, d in (((2, 6, 7), 1), ((2, 7, 6), 2))
    )
    first.load_state_dict(dict(zip(first.state_dict(), last.state_dict().values(), strict=True)))
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(first(x.mT), last(x))


def test_batchnorm_of_heads_is_pytorchs_but_for_single_values():
    ours, theirs = HeadBatchNorm(5), nn.BatchNorm2d(5)
    for x in (torch.randn(4, 5, 3, 3), torch.randn(1, 5, 2, 1)):
        assert torch.equal(ours(x), theirs(x))
    one = torch.randn(1, 5, 1, 1)
    assert torch.equal(ours(one), theirs.eval()(one))
    assert torch.equal(ours(one[:, :, 0, 0]), ours(one)[:, :, 0, 0])
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("name", ["sedona-basic-4", "mlp-sr", "cnn", "linear", "tokens-3"])
def test_heads_can_be_traced_in_eval_mode(name):
    head = build_head(name, image(8, 4)).eval()
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(torch.fx.symbolic_trace(head)(x), head(x))
