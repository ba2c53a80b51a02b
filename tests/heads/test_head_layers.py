"""The nets behind the heads against the papers: layers, channels, strides."""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.layers import AttentionPool, HeadBatchNorm, InvertedResidual, Mean, Resample, ResidualMLP
from sedona_fx.heads.pointwise_pool import PointwisePool
from sedona_fx.heads.registry import build_head


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
    first, last = (build_head("tokens-2", HeadContext(s, (2, 10), d)) for s, d in (((2, 6, 7), 1), ((2, 7, 6), 2)))
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


def hand_batch_norm(norm: HeadBatchNorm, x: Tensor) -> Tensor:
    """BatchNorm in training, written out."""
    dims, weight, bias = (0, *range(2, x.dim())), *(p.view(-1, *(1,) * (x.dim() - 2)) for p in (norm.weight, norm.bias))
    centered = x - x.mean(dims, keepdim=True)
    return centered / (centered.square().mean(dims, keepdim=True) + norm.eps).sqrt() * weight + bias


CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@pytest.mark.parametrize("shape", [(4, 8, 9), (4, 8, 5, 6), (4, 8, 3, 5, 4)], ids=str)
def test_sedona_2_by_hand_in_one_to_three_dimensions(shape):
    torch.manual_seed(0)
    head, conv = build_head("sedona-2", HeadContext(shape, (4, 3), 1)), CONVS[len(shape)]
    convs = [m for m in head.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    norms = [m for m in head.modules() if isinstance(m, HeadBatchNorm)]
    assert [m.weight.shape[:2] for m in convs] == [(2, 8), (2, 1), (8, 2), (8, 1), (2, 8), (512, 2)]
    x = torch.randn(shape)
    h = F.relu(hand_batch_norm(norms[0], conv(x, convs[0].weight)))
    h = F.relu(hand_batch_norm(norms[1], conv(h, convs[1].weight, stride=2, padding=1, groups=2)))
    branch = F.relu(hand_batch_norm(norms[2], conv(h, convs[2].weight)))
    branch = F.relu(hand_batch_norm(norms[3], conv(branch, convs[3].weight, padding=1, groups=8)))
    h = h + hand_batch_norm(norms[4], conv(branch, convs[4].weight))
    wide = conv(h, convs[5].weight.view(512, 2, *(1,) * (len(shape) - 2)))
    pooled = F.relu(hand_batch_norm(norms[5], wide)).flatten(2).mean(2)
    torch.testing.assert_close(head(x), F.linear(pooled, head[-1].weight, head[-1].bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("shape", "quarter"), [((3, 16, 9), (3,)), ((3, 16, 2, 9, 5), (1, 3, 2))])
def test_dgl_heads_pool_to_two_a_side(shape, quarter):
    head = build_head("mlp-sr", HeadContext(shape, (3, 10), 1))
    width = 16 * 2 ** len(quarter)
    assert [m.output_size for m in head if isinstance(m, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool3d)] == [quarter, 2]
    assert [m.kernel_size for m in head if isinstance(m, nn.Conv1d | nn.Conv3d)] == [(1,) * len(quarter)] * 3
    assert [line for line in facts(head) if line.startswith("linear")] == [
        *[f"linear {width}>{width}"] * 3,
        f"linear {width}>10",
    ]


def hand_token(x: Tensor, head: nn.Module) -> Tensor:
    """LayerNorm and one residual MLP of a head on its tokens, written out."""
    norm, mlp = (next(m for m in head if isinstance(m, kind)) for kind in (nn.LayerNorm, ResidualMLP))
    x = F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias)
    inner = F.layer_norm(x, (x.shape[-1],), mlp.norm.weight, mlp.norm.bias)
    inner = F.gelu(F.linear(inner, mlp.linear1.weight, mlp.linear1.bias))
    return x + F.linear(inner, mlp.linear2.weight, mlp.linear2.bias)


@pytest.mark.parametrize("token", [None, 0, -1, 3])
def test_tokens_2_by_hand(token):
    head = build_head("tokens-2", HeadContext((2, 7, 6), (2, 10), -1, "", token))
    x = torch.randn(2, 7, 6)
    tokens = hand_token(x, head)
    pooled = tokens.mean(1) if token is None else tokens[:, token]
    torch.testing.assert_close(head(x), F.linear(pooled, head[-1].weight, head[-1].bias))


@pytest.mark.parametrize(("shape", "dim"), [((2, 7, 6), 2), ((2, 3, 4, 6), 3), ((2, 6, 3, 4), 1)])
def test_attention_heads_by_hand(shape, dim):
    head = build_head("tokens-attention-2", HeadContext(shape, (2, 10), dim))
    pool, x = head[-2], torch.randn(shape)
    assert isinstance(pool, AttentionPool)
    tokens = hand_token(x.movedim(dim, -1).reshape(2, -1, 6), head)
    torch.testing.assert_close(pool(tokens), tokens.mean(1))  # as it starts
    nn.init.normal_(pool.query)
    pooled = F.scaled_dot_product_attention(pool.query.expand(2, 1, 6), tokens, tokens).squeeze(1)
    torch.testing.assert_close(head(x), F.linear(pooled, head[-1].weight, head[-1].bias))


def test_logits_2_by_hand():
    head = build_head("logits-2", HeadContext((2, 7, 6), (2, 7, 11), -1))
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(head(x), F.linear(hand_token(x, head), head[-1].weight, head[-1].bias))
    torch.testing.assert_close(head(x[:, 4:5]), head(x)[:, 4:5])  # no token sees another


@pytest.mark.parametrize(
    ("shape", "dim", "token"),
    [
        ((4, 6, 5, 7), 1, None),
        ((4, 5, 7, 6), -1, None),
        ((4, 35, 6), 2, None),
        ((4, 36, 6), 2, 0),
        ((4, 6, 2, 5, 7), 1, 0),
    ],
)
def test_dense_2_by_hand(shape, dim, token):
    size = (2, 5, 7) if len(shape) == 5 else (5, 7)
    wanted = tuple(3 * side for side in size)
    head = build_head("dense-2", HeadContext(shape, (4, 3, *wanted), dim, "", token))
    convs = [m for m in head if isinstance(m, nn.Conv2d | nn.Conv3d)]
    norms = [m for m in head if isinstance(m, HeadBatchNorm)]
    conv, mode = CONVS[2 + len(size)], "bilinear" if len(size) == 2 else "trilinear"
    x = torch.randn(shape)
    maps = (x[:, 1:] if shape[1] == 36 else x).movedim(dim, 1).reshape(4, 6, *size)
    h = F.relu(hand_batch_norm(norms[0], conv(maps, convs[0].weight)))
    h = F.relu(hand_batch_norm(norms[1], conv(h, convs[1].weight, padding=1)))
    h = conv(h, convs[2].weight, convs[2].bias)
    torch.testing.assert_close(head(x), F.interpolate(h, size=wanted, mode=mode, align_corners=False))


@pytest.mark.parametrize(("channels", "width"), [(1, 1), (12, 12), (16, 16), (40, 16), (64, 16), (256, 64)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_width_of_dense_heads(channels, width, depth):
    head = build_head(f"dense-{depth}", HeadContext((2, channels, 4, 4), (2, 21, 8, 8)))
    convs = [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in head if isinstance(m, nn.Conv2d)]
    assert convs == [(channels, width, 1), *[(width, width, 3)] * (depth - 1), (width, 21, 1)]


def test_output_layers_start_with_gain_one_and_the_others_with_that_of_relu():
    torch.manual_seed(0)
    for name, context in (
        ("dense-2", HeadContext((2, 1024, 4, 4), (2, 512, 8, 8))),
        ("linear", HeadContext((2, 40000, 2, 2), (2,))),
        ("logits-1", HeadContext((2, 4, 256), (2, 4, 512), 2)),
    ):
        weights = [m.weight for m in build_head(name, context) if isinstance(m, nn.Conv2d | nn.Linear)]
        gains = [weight.var().item() * weight[0].numel() for weight in weights]
        assert gains == pytest.approx([*[2] * (len(weights) - 1), 1], rel=0.05)


def test_resampling_reads_the_same_share_of_the_way_at_first():
    """With equal numbers of tokens each position reads mostly itself; reversed tokens come out reversed."""
    layer = Resample(32, 6)
    tokens = torch.eye(6, 32).expand(2, 6, 32)
    out = layer(tokens)[..., :6]
    assert out.shape == (2, 6, 6)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 6))  # weights of an average
    assert out.argmax(-1).tolist() == [list(range(6))] * 2
    torch.testing.assert_close(layer(tokens.flip(1))[..., :6], out.flip(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [7, 8])
def test_resampling_is_attention_written_by_hand(features):
    torch.manual_seed(0)
    layer = Resample(features, 5).double()
    with torch.no_grad():
        layer.key.normal_()
    x = torch.randn(3, 4, 2, features, dtype=torch.float64)
    tokens = x.reshape(3, 8, features)
    half = (features + 1) // 2
    frequencies = [math.pi * 128 ** (k / (half - 1)) for k in range(half)]
    places = torch.tensor(
        [[f((s + 0.5) / 8 * w) for f in (math.sin, math.cos) for w in frequencies][:features] for s in range(8)],
        dtype=torch.float64,
    )
    keys = tokens @ layer.key + places
    expected = nn.functional.scaled_dot_product_attention(layer.query.expand(3, 5, features), keys, tokens)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # sinusoids are made in float32
