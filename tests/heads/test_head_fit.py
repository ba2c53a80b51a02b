"""Which built-in head fits where, and that each fits: every name in every context that takes it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from sedona_fx.errors import HeadError
from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.layers import HeadBatchNorm, Resize, TokenGrid
from sedona_fx.heads.registry import build_head, default_candidates, default_head, fitting_heads, head_names


def names(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}-{depth}" for kind in kinds for depth in range(1, 5 if kind.startswith("sedona") else 4))


SPATIAL = (*names("sedona", "sedona-wide", "sedona-basic"), "mlp", "mlp-sr", "cnn")
ANY, ATTENTION, DENSE, LOGITS = ("linear", *names("tokens")), names("tokens-attention"), names("dense"), names("logits")
RESAMPLE = names("resample")

# Context, the heads that fit, the candidates, the default.
CONTEXTS: dict[str, tuple[HeadContext, tuple[str, ...], tuple[str, ...], str]] = {
    "image": (HeadContext((3, 8, 6, 7), (3, 4)), SPATIAL + ANY + ATTENTION, names("sedona"), "mlp-sr"),
    "one pixel": (HeadContext((3, 8, 1, 1), (3, 4)), SPATIAL + ANY + ATTENTION, names("sedona"), "mlp-sr"),
    "video": (HeadContext((3, 8, 4, 6, 5), (3, 4)), SPATIAL + ANY + ATTENTION, names("sedona"), "sedona-1"),
    "one frame": (HeadContext((3, 8, 1, 5, 5), (3, 4)), SPATIAL + ANY + ATTENTION, names("sedona"), "sedona-1"),
    "sequence": (HeadContext((3, 8, 9), (3, 4), 1), SPATIAL + ANY + ATTENTION, names("sedona"), "mlp-sr"),
    "wide sequence": (HeadContext((3, 136, 9), (3, 4), 1), SPATIAL + ANY + ATTENTION, names("sedona"), "sedona-1"),
    "tokens": (HeadContext((3, 9, 8), (3, 4), -1), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "one token": (HeadContext((3, 1, 8), (3, 4), -1), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "class token": (HeadContext((3, 9, 8), (3, 4), 2, "", 0), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "last token": (HeadContext((3, 9, 8), (3, 4), -1, "", -1), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "channels last": (HeadContext((3, 4, 5, 8), (3, 4), 3), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "video last": (HeadContext((3, 2, 4, 5, 8), (3, 4), -1), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "vector": (HeadContext((3, 8), (3, 4)), SPATIAL + ANY, names("tokens"), "tokens-2"),
    "one feature": (HeadContext((3, 7, 1), (3, 4), 2), ("linear",), ("linear",), "linear"),
    "regression": (HeadContext((3, 8, 4, 4), (3,)), SPATIAL + ANY + ATTENTION, names("sedona"), "mlp-sr"),
    "one score": (HeadContext((3, 9, 8), (3, 1), 2), ANY + ATTENTION, names("tokens"), "tokens-2"),
    "segmentation": (HeadContext((3, 8, 6, 7), (3, 5, 24, 28)), DENSE, DENSE, "dense-2"),
    "odd sides": (HeadContext((3, 40, 5, 7), (3, 5, 33, 50)), DENSE, DENSE, "dense-2"),
    "same sides": (HeadContext((3, 2, 5, 7), (3, 1, 5, 7)), DENSE, DENSE, "dense-2"),
    "smaller maps": (HeadContext((3, 8, 6, 8), (3, 5, 2, 3)), DENSE, DENSE, "dense-2"),
    "maps of a pixel": (HeadContext((3, 8, 1, 1), (3, 5, 7, 9)), DENSE, DENSE, "dense-2"),
    "maps last": (HeadContext((3, 6, 8, 8), (3, 5, 24, 32), 3), DENSE, DENSE, "dense-2"),
    "maps of tokens": (HeadContext((3, 12, 8), (3, 5, 48, 64), 2), DENSE, DENSE, "dense-2"),
    "with class token": (HeadContext((3, 13, 8), (3, 5, 48, 64), 2, "", 0), DENSE, DENSE, "dense-2"),
    "volume": (HeadContext((3, 8, 2, 6, 8), (3, 5, 4, 23, 31)), DENSE, DENSE, "dense-2"),
    "volume last": (HeadContext((3, 2, 6, 8, 8), (3, 5, 2, 12, 16), 4), DENSE, DENSE, "dense-2"),
    "labels of a sequence": (HeadContext((3, 8, 9), (3, 5, 9), 1), DENSE, DENSE, "dense-2"),
    "language": (HeadContext((3, 9, 8), (3, 9, 95), 2), LOGITS, LOGITS, "logits-2"),
    "large vocabulary": (HeadContext((3, 9, 8), (3, 9, 96), 2), LOGITS, LOGITS, "logits-1"),
    "sequence to tokens": (HeadContext((3, 8, 9), (3, 9, 11), 1), LOGITS, LOGITS, "logits-2"),
    "grid of logits": (HeadContext((3, 4, 5, 8), (3, 4, 5, 6), 3), LOGITS, LOGITS, "logits-2"),
    "translation": (HeadContext((3, 9, 8), (3, 7, 95), 2), RESAMPLE, RESAMPLE, "resample-2"),
    "to more tokens": (HeadContext((3, 4, 8), (3, 9, 96), 2), RESAMPLE, RESAMPLE, "resample-1"),
    "captions": (HeadContext((3, 8, 4, 5), (3, 7, 11), 1), RESAMPLE, RESAMPLE, "resample-2"),
    "captions, last": (HeadContext((3, 4, 5, 8), (3, 7, 11), 3), RESAMPLE, RESAMPLE, "resample-2"),
    "queries of a detector": (HeadContext((3, 16, 8), (3, 10, 6), 2), RESAMPLE, RESAMPLE, "resample-2"),
    "sound": (HeadContext((3, 8, 9), (3, 4, 11), 1), RESAMPLE, RESAMPLE, "resample-2"),
    "both, last": (HeadContext((3, 9, 8), (3, 9, 9), 2), DENSE + LOGITS, LOGITS, "logits-2"),
    "both, first": (HeadContext((3, 8, 9), (3, 9, 9), 1), DENSE + LOGITS, DENSE, "dense-2"),
}
PAIRS = [(key, name) for key, (_, fitting, _, _) in CONTEXTS.items() for name in fitting]
# What is cheap enough to compile: one depth of each kind, in the contexts that differ in code.
SOME = [
    *(("sequence", name) for name in ("sedona-4", "mlp-sr", "cnn", "tokens-2")),
    *(("video", name) for name in ("sedona-4", "mlp-sr", "cnn", "tokens-2")),
    *(("class token", "tokens-2"), ("channels last", "tokens-attention-2"), ("regression", "linear")),
    *((key, "dense-2") for key in ("odd sides", "smaller maps", "maps last", "with class token", "volume")),
    *(("translation", "resample-2"), ("captions", "resample-2")),
    *(("labels of a sequence", "dense-2"), ("language", "logits-2"), ("grid of logits", "logits-2")),
]


def other_sizes(context: HeadContext, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shapes of activation and output for another batch and, where there are any, other sizes."""
    shape, output = [5, *context.shape[1:]], [5, *context.output_shape[1:]]
    places = [dim for dim in range(1, len(shape)) if dim != context.channel_dim % len(shape)]
    dense = name in DENSE
    if dense and len(places) == 1 and len(output) == 4:  # a grid of tokens, twice as long a side
        skip = 1 if context.token == 0 else 0
        shape[1] = 4 * (shape[1] - skip) + skip
        return tuple(shape), (*output[:2], 2 * output[2], 2 * output[3])
    for position, dim in enumerate(places):
        before = shape[dim]
        shape[dim] += 2 + position
        if dense:
            wide = output[2 + position]
            rounded = math.floor if wide >= before else math.ceil
            output[2 + position] = rounded(shape[dim] * wide / before + (0.5 if wide >= before else 0))
        elif name in LOGITS:
            output[1 + position] = shape[dim]
    return tuple(shape), tuple(output)


BUILT_IN = (*SPATIAL, *ANY, *ATTENTION, *DENSE, *LOGITS, *RESAMPLE, "embedding")


@pytest.mark.parametrize("key", CONTEXTS)
def test_what_fits_where(key):
    context, fitting, candidates, default = CONTEXTS[key]
    assert fitting_heads(context) == fitting
    assert default_candidates(context) == candidates
    assert default_head(context) == default
    assert default in fitting
    assert set(candidates) <= set(fitting)
    for name in set(BUILT_IN) - set(fitting):  # other tests register heads of their own
        with pytest.raises(HeadError, match=r"The activation there is \(3, .*, the output \(3,.*Heads that fit: '"):
            build_head(name, context)


def test_all_names():
    assert head_names()[: len(BUILT_IN)] == BUILT_IN


@pytest.mark.parametrize(("key", "name"), PAIRS)
def test_every_head_fits(key, name):
    context = CONTEXTS[key][0]
    torch.manual_seed(0)
    head = build_head(name, context)
    torch.manual_seed(0)
    again = build_head(name, context).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in head.state_dict().items())
    x = torch.randn(context.shape)
    assert head(x).shape == context.output_shape
    assert head(x[:1]).shape == (1, *context.output_shape[1:])
    shape, output_shape = other_sizes(context, name)
    assert head(torch.randn(shape)).shape == output_shape
    for module in head.modules():
        if isinstance(module, HeadBatchNorm):  # so that no ReLU is 0 for all examples: a head of 8 channels has few
            nn.init.uniform_(module.bias, 1, 2)
    for training in (True, False):
        head.train(training)
        head.zero_grad()
        (head(x) * torch.randn(context.output_shape)).sum().backward()
        for parameter, tensor in head.named_parameters():
            assert tensor.grad is not None, parameter
            assert tensor.grad.isfinite().all(), parameter
            # In training a BatchNorm cancels the biases of DGL's linear layers, and one token needs no weighing.
            assert training or tensor.grad.any() or parameter.endswith("query"), parameter
            assert tensor.grad.any() or not parameter.endswith("query") or math.prod(context.positions) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("key", "name"), SOME)
def test_heads_in_other_dtypes(key, name, dtype):
    context = CONTEXTS[key][0]
    head, x = build_head(name, context), torch.randn(context.shape)
    wanted, output = head(x), head.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    (gradient,) = torch.autograd.grad(output.square().sum(), [next(head.parameters())])
    assert gradient.isfinite().all()
    assert (output.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize(("key", "name"), SOME)
def test_heads_can_be_traced_and_exported(key, name):
    context = CONTEXTS[key][0]
    head, x = build_head(name, context).eval(), torch.randn(context.shape)
    other = torch.randn(other_sizes(context, name)[0])
    traced = torch.fx.symbolic_trace(head)
    assert torch.equal(traced(x), head(x))
    assert torch.equal(traced(other), head(other))
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x[:2]), head(x[:2]))


@pytest.mark.parametrize("key", ["odd sides", "volume", "maps of tokens", "language"])
def test_sizes_may_be_symbols(key):
    context = CONTEXTS[key][0]
    name, auto = default_head(context), torch.export.Dim.AUTO
    head = build_head(name, context).eval()
    sizes = {dim: auto for dim in range(len(context.shape)) if dim != context.channel_dim % len(context.shape)}
    exported = torch.export.export(head, (torch.randn(context.shape),), dynamic_shapes=(sizes,)).module()
    other = torch.randn(other_sizes(context, name)[0])
    torch.testing.assert_close(exported(other), head(other))


@pytest.mark.parametrize(
    ("context", "text"),
    [
        # Maps: as many sides, a grid of the same proportions, channels first, something to lay out.
        (
            HeadContext((2, 8, 4, 4), (2, 3, 5, 8, 8), 1, "a.b"),
            r"behind 'a.b'.*\(2, 8, 4, 4\).*\(2, 3, 5, 8, 8\).*as the activation has, 2 and not 3",
        ),
        (HeadContext((2, 8, 5, 4, 4), (2, 3, 8, 8)), r"as the activation has, 3 and not 2"),
        (HeadContext((2, 12, 8), (2, 3, 8, 8), 2), r"12 tokens are none in the proportions 8 to 8"),
        (HeadContext((2, 17, 8), (2, 3, 8, 8), 2), r"17 tokens are none"),
        (HeadContext((2, 16, 8), (2, 3, 8, 8), 2, "", 0), r"15 tokens are none"),
        (HeadContext((2, 9, 8, 8), (2, 16, 16, 3)), r"seems to have them last"),
        (HeadContext((2, 8), (2, 3, 8, 8)), r"as the activation has, 0 and not 2"),
        # The batch.
        (HeadContext((2, 9, 8), (18, 50), 2), r"holds 2 examples and the output 18"),
        (HeadContext((2, 9, 8), (4, 9, 50), 2), r"holds 2 examples and the output 4"),
        (HeadContext((2, 8, 4, 4), (4, 3, 8, 8)), r"holds 2 examples and the output 4"),
        (HeadContext((2, 8, 4, 4), ()), r"the output \(\)"),
        (HeadContext((2, 9, 1), (2, 9, 50), 2), r"a single one would always"),
    ],
)
def test_where_nothing_fits(context, text):
    assert fitting_heads(context) == ()
    advice = r".*Give a factory in heads=\[...\], an objective of your own in local_loss=..., or heads=False and a sche"
    for choose in (default_candidates, default_head):
        with pytest.raises(HeadError, match=text + advice):
            choose(context)
    for name in ("linear", "tokens-1", "dense-2", "logits-2", "mlp"):
        with pytest.raises(HeadError, match=r"cannot stand.*None fits: Give a factory"):
            build_head(name, context)


def test_no_layout_no_heads():
    for query in (default_candidates, default_head, fitting_heads):
        with pytest.raises(HeadError, match=r"\(2, 3\) with its channels in dimension 0"):
            query(HeadContext((2, 3), (2, 3), 0))


def test_a_token_has_to_be_there():
    for token in (9, -10):
        with pytest.raises(HeadError, match=rf"said to read token {token}, and there are 9"):
            build_head("tokens-1", HeadContext((3, 9, 8), (3, 4), 2, "", token))
    # It is of (N, T, D) alone: elsewhere dimension 1 does not count tokens.
    context = HeadContext((3, 4, 5, 8), (3, 4), 3, "", 30)
    assert build_head("tokens-1", context)(torch.randn(context.shape)).shape == (3, 4)


# The layers that know sizes


@pytest.mark.parametrize(("given", "wanted"), [((5, 7), (33, 50)), ((1, 3), (1, 2)), ((4, 6, 5), (4, 13, 2))])
def test_resizing_is_pytorchs(given, wanted):
    resize, mode = Resize(given, wanted), "bilinear" if len(given) == 2 else "trilinear"
    for factor in (1, 2, 3):
        x = torch.randn(2, 3, *(factor * side for side in given))
        size = tuple(factor * side for side in wanted)
        assert torch.equal(resize(x), nn.functional.interpolate(x, size=size, mode=mode, align_corners=False))


@pytest.mark.parametrize(("side", "result"), [(1, 1), (2, 1), (3, 1), (9, 3), (10, 4), (8, 3)])
def test_no_side_vanishes(side, result):
    assert Resize((9, 9), (3, 3))(torch.randn(1, 1, side, 9)).shape == (1, 1, result, 3)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("factor", [1, 2, 5, 40])
def test_tokens_are_laid_out_row_by_row(skip, factor):
    height, width = 3 * factor, 4 * factor
    x: Tensor = torch.randn(2, skip + height * width, 5)
    grid = TokenGrid((3, 4), skip)(x)
    assert grid.shape == (2, 5, height, width)
    for row, column in ((0, 0), (0, 1), (1, 0), (height - 1, width - 1)):
        assert torch.equal(grid[:, :, row, column], x[:, skip + row * width + column])
