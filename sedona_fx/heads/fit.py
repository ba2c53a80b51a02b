"""Which built-in head fits which activation and output, and the head's sizes for them.

Each kind of head has a function ``refuses_...`` that returns the reason why the kind cannot be used in a context, or an
empty text if it can, and a function that derives the sizes of its net from the context. The registry holds the results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from sedona_fx.heads import nets
from sedona_fx.heads.context import HeadContext, HeadFactory
from sedona_fx.heads.layers import MoveDim, Resize, TokenGrid

EMBEDDING = 128
"""Number of features that the head ``embedding`` gives."""
Refusal = Callable[[HeadContext], str]
"""Returns the reason why a kind of head cannot be used in a context, or an empty text if it can."""


def built_in() -> dict[str, tuple[HeadFactory, Refusal]]:
    """Return the factory and the refusal of every built-in head, by name."""
    sedona_options: dict[str, dict[str, Any]] = {
        "sedona": {},
        "sedona-wide": {"features": 2048},
        "sedona-basic": {"expansion": 1},
    }
    table: dict[str, tuple[HeadFactory, Refusal]] = {}
    for name, options in sedona_options.items():
        for depth in range(1, 5):
            sedona = functools.partial(_spatial_head, nets.sedona_head, depth=depth, **options)
            table[f"{name}-{depth}"] = sedona, refuses_spatial
    mlp = functools.partial(_spatial_head, nets.mlp_head)
    table["mlp"] = mlp, refuses_spatial
    table["mlp-sr"] = functools.partial(mlp, spatial=3), refuses_spatial
    table["cnn"] = functools.partial(_spatial_head, nets.cnn_head), refuses_spatial
    table["linear"] = _linear_head, refuses_scores
    for name, build, refuses in (
        ("tokens", _token_head, refuses_tokens),
        ("tokens-attention", functools.partial(_token_head, attention=True), refuses_attention),
        ("dense", _dense_head, refuses_dense),
        ("logits", _logits_head, refuses_logits),
        ("resample", _resample_head, refuses_resampling),
    ):
        for depth in range(1, 4):
            table[f"{name}-{depth}"] = functools.partial(build, depth=depth), refuses
    table["embedding"] = _embedding_head, refuses_embedding
    return table


def ladder(context: HeadContext) -> tuple[str, ...]:
    """Return the built-in heads to choose from by default, of growing depth; empty if no built-in head fits.

    Some outputs, (N, 9, 9) for example, can be read both as dense maps and as token logits. They are taken as maps if
    the activation has its channels first, and as logits otherwise.
    """
    if not context.is_vector and not refuses_spatial(context):
        return _depths("sedona", 4)
    if not refuses_tokens(context):
        return _depths("tokens", 3)
    if not refuses_scores(context):
        return ("linear",)
    kinds = {"dense": refuses_dense, "logits": refuses_logits}
    for name in kinds if context.channels_first else reversed(kinds):
        if not kinds[name](context):
            return _depths(name, 3)
    if not refuses_resampling(context):
        return _depths("resample", 3)
    return ()


def refuses_scores(context: HeadContext) -> str:
    """Return why a head cannot give class scores, (N, classes) or (N,), from any activation."""
    if len(context.output_shape) not in (1, 2):
        return "it gives class scores, (N, classes) or (N,)"
    return _refuses_batch(context)


def refuses_spatial(context: HeadContext) -> str:
    """Return why a head cannot give class scores from (N, D), or from channels first and one to three dimensions."""
    if not context.channels_first or len(context.shape) > 5:
        return "it reads images (N, C, H, W), video (N, C, T, H, W), sequences (N, C, L) or vectors (N, D)"
    return refuses_scores(context)


def refuses_tokens(context: HeadContext) -> str:
    """Return why a head cannot give class scores from normalised features."""
    token = _token(context)
    if token is not None and not -context.shape[1] <= token < context.shape[1]:
        return f"the model's output is said to read token {token}, and there are {context.shape[1]}"
    return _refuses_one_feature(context) or refuses_scores(context)


def refuses_attention(context: HeadContext) -> str:
    """Return why a head cannot give class scores by attention over normalised features."""
    if not context.positions:
        return "it attends over tokens, and vectors (N, D) have none"
    return _refuses_one_feature(context) or refuses_scores(context)


def refuses_logits(context: HeadContext) -> str:
    """Return why a head cannot give logits token by token: (N, T, D) to (N, T, V), (N, H, W, D) to (N, H, W, V)."""
    if not context.positions or len(context.output_shape) != len(context.shape):
        return "it gives token logits, (N, T, V) from (N, T, D)"
    if context.output_shape[1:-1] != context.positions:
        return (
            f"it gives token logits and cannot know which of the output's {_count(context.output_shape[1:-1])} tokens "
            f"belongs to which of the activation's {_count(context.positions)}"
        )
    return _refuses_one_feature(context) or _refuses_batch(context)


def refuses_resampling(context: HeadContext) -> str:
    """Return why a head cannot give token logits, (N, T, V), from an activation of another number of positions."""
    if not context.positions or len(context.output_shape) != 3:
        return "it gives token logits, (N, T, V), from an activation with positions, (N, S, D)"
    for kind, refuses in (("logits", refuses_logits), ("dense", refuses_dense)):
        if not refuses(context):
            return f"it is for outputs of another length, and the output's positions are the activation's: take {kind}"
    return _refuses_one_feature(context) or _refuses_batch(context)


def refuses_dense(context: HeadContext) -> str:
    """Return why a head cannot give dense maps: (N, K, H, W), or one or three dimensions after K."""
    sizes, output_sizes = context.positions, context.output_shape[2:]
    if len(output_sizes) not in (1, 2, 3):
        return "it gives dense maps, (N, K, H, W) or (N, K, T, H, W)"
    if len(sizes) != len(output_sizes):
        if len(context.shape) != 3 or context.channels_first or len(output_sizes) != 2:
            return (
                f"it gives dense maps of as many sides as the activation has, {len(sizes)} and not {len(output_sizes)}"
            )
        if _token_grid(context) is None:
            return (
                f"it lays tokens out as a map like the output's, and {sizes[0] - _skipped_tokens(context)} tokens are "
                f"none in the proportions {output_sizes[0]} to {output_sizes[1]}"
            )
    elif len(output_sizes) == 1 and output_sizes != sizes:
        return (
            f"it gives dense maps, and of an output with three dimensions it cannot tell which is the classes' unless "
            f"the last is as long as the activation, {sizes[0]}"
        )
    elif (
        len(output_sizes) > 1
        and _in_proportion(sizes, context.output_shape[1:-1])
        and not _in_proportion(sizes, output_sizes)
    ):
        return "it gives dense maps with their channels in dimension 1, and this output seems to have them last"
    return _refuses_batch(context)


KINDS = {
    "linear": refuses_scores,
    "dense-1": refuses_dense,
    "logits-1": refuses_logits,
    "resample-1": refuses_resampling,
}
"""For each kind of output, the head that requires least of the activation."""


def _depths(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}-{depth}" for depth in range(1, count + 1))


def refuses_embedding(context: HeadContext) -> str:
    """Return why a head cannot give an embedding, (N, features), whatever the model gives."""
    return "" if context.free_output else "it gives embeddings, for an objective of your own (local_loss=)"


def _refuses_batch(context: HeadContext) -> str:
    if context.no_output is not None:
        return context.no_output.reason
    if context.output_shape[0] != context.shape[0]:
        return (
            f"the activation holds {context.shape[0]} examples and the output {context.output_shape[0]}, so it cannot "
            "know which belongs to which"
        )
    return ""


def _refuses_one_feature(context: HeadContext) -> str:
    if context.channels == 1:
        return "it normalises over the features, and a single one would always come out as 0"
    return ""


def _token(context: HeadContext) -> int | None:
    return context.token if len(context.shape) == 3 and not context.channels_first else None


def _skipped_tokens(context: HeadContext) -> int:
    # A class token has no place on the map.
    return 1 if context.token == 0 else 0


def _token_grid(context: HeadContext) -> tuple[int, int] | None:
    """Return the (h, w) that hold all tokens in exactly the output's proportions, or None if no such sizes exist."""
    count, (height, width) = context.positions[0] - _skipped_tokens(context), context.output_shape[2:]
    h = math.isqrt(count * height // width)
    return (h, count // h) if h and count % h == 0 and h * width == count // h * height else None


def _in_proportion(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(size * others[0] == other * sizes[0] for size, other in zip(sizes, others, strict=True))


def _count(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _with_scores(head: nn.Sequential, context: HeadContext) -> nn.Sequential:
    """Return the head, with (N, 1) flattened to (N,) if that is the output's shape."""
    return head.append(nn.Flatten(0)) if len(context.output_shape) == 1 else head


def _classes(context: HeadContext) -> int:
    return context.output_shape[1] if len(context.output_shape) == 2 else 1


def _layout(context: HeadContext) -> dict[str, Any]:
    return {"channel_dim": context.channel_dim % len(context.shape), "rank": len(context.shape)}


def _spatial_head(build: Callable[..., nn.Sequential], context: HeadContext, **options: int) -> nn.Module:
    size = (1, 1) if context.is_vector else context.positions
    head = build(context.channels, size, _classes(context), vector=context.is_vector, **options)
    return _with_scores(head, context)


def _linear_head(context: HeadContext) -> nn.Module:
    return _with_scores(nets.linear_head(context.channels, _classes(context), **_layout(context)), context)


def _embedding_head(context: HeadContext) -> nn.Module:
    return nets.linear_head(context.channels, EMBEDDING, **_layout(context))


def _token_head(context: HeadContext, *, depth: int, attention: bool = False) -> nn.Module:
    pool: dict[str, Any] = {"attention": True} if attention else {"token": _token(context)}
    head = nets.token_head(context.channels, _classes(context), depth, **_layout(context), **pool)
    return _with_scores(head, context)


def _logits_head(context: HeadContext, *, depth: int) -> nn.Module:
    return nets.logits_head(context.channels, context.output_shape[-1], depth, **_layout(context))


def _resample_head(context: HeadContext, *, depth: int) -> nn.Module:
    _, length, vocabulary = context.output_shape
    return nets.resample_head(context.channels, vocabulary, length, depth, **_layout(context))


def _dense_head(context: HeadContext, *, depth: int) -> nn.Module:
    sizes, output_sizes = context.positions, context.output_shape[2:]
    before: list[nn.Module] = []
    if len(sizes) != len(output_sizes):
        grid = _token_grid(context)
        assert grid is not None  # refuses_dense would have said so
        sizes, before = grid, [TokenGrid(grid, _skipped_tokens(context))]
    elif not context.channels_first:
        before = [MoveDim(context.channel_dim, 1)]
    after = [Resize(sizes, output_sizes)] if sizes != output_sizes else []
    maps = context.output_shape[1]
    return nets.dense_head(context.channels, maps, depth, dims=len(sizes), before=before, after=after)
