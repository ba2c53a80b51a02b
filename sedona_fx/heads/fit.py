"""Which built-in head fits which activation and output, and the layers that bring the shape of one to the other's.

Each kind of head has a function that says why it cannot stand in a context (or "", where it can), and one that reads
the sizes of its net off the context. `heads` holds the results in its registry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.heads import layers as head_layers

if TYPE_CHECKING:
    from sedona_fx.heads.context import HeadContext


def built_in() -> dict[str, tuple[Callable[[HeadContext], nn.Module], Callable[[HeadContext], str]]]:
    """Return every built-in head by name: its factory, and what says why it cannot stand in a context (or "")."""
    forms: dict[str, dict[str, Any]] = {
        "sedona": {},
        "sedona-wide": {"features": 2048},
        "sedona-basic": {"expansion": 1},
    }
    table: dict[str, tuple[Callable[[HeadContext], nn.Module], Callable[[HeadContext], str]]] = {}
    for form, options in forms.items():
        for depth in range(1, 5):
            sedona = functools.partial(_spatial_head, head_layers.sedona_head, depth=depth, **options)
            table[f"{form}-{depth}"] = sedona, refuses_spatial
    mlp = functools.partial(_spatial_head, head_layers.mlp_head)
    table["mlp"] = mlp, refuses_spatial
    table["mlp-sr"] = functools.partial(mlp, spatial=3), refuses_spatial
    table["cnn"] = functools.partial(_spatial_head, head_layers.cnn_head), refuses_spatial
    table["linear"] = _linear_head, refuses_scores
    for name, build, refuses in (
        ("tokens", _token_head, refuses_tokens),
        ("tokens-attention", functools.partial(_token_head, attention=True), refuses_attention),
        ("dense", _dense_head, refuses_dense),
        ("logits", _logits_head, refuses_logits),
    ):
        for depth in range(1, 4):
            table[f"{name}-{depth}"] = functools.partial(build, depth=depth), refuses
    return table


def ladder(context: HeadContext) -> tuple[str, ...]:
    """Return the built-in heads of growing depth to choose from by default, none where none fits.

    Some outputs can be read both as dense maps and as token logits, (N, 9, 9) for one: then maps behind activations
    with channels first, logits behind the others.
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
    return ()


def refuses_scores(context: HeadContext) -> str:
    """Say why a head cannot give class scores, (N, classes) or (N,), from any activation."""
    if len(context.output_shape) not in (1, 2):
        return "it gives class scores, (N, classes) or (N,)"
    return _refuses_batch(context)


def refuses_spatial(context: HeadContext) -> str:
    """Say why a head cannot give class scores from (N, D) or from channels first and one to three dimensions."""
    if not context.channels_first or len(context.shape) > 5:
        return "it reads images (N, C, H, W), video (N, C, T, H, W), sequences (N, C, L) or vectors (N, D)"
    return refuses_scores(context)


def refuses_tokens(context: HeadContext) -> str:
    """Say why a head cannot give class scores from normalised features."""
    token = _token(context)
    if token is not None and not -context.shape[1] <= token < context.shape[1]:
        return f"the model's output is said to read token {token}, and there are {context.shape[1]}"
    return _refuses_one_feature(context) or refuses_scores(context)


def refuses_attention(context: HeadContext) -> str:
    """Say why a head cannot give class scores by attending over normalised features."""
    if not context.positions:
        return "it attends over tokens, and vectors (N, D) have none"
    return _refuses_one_feature(context) or refuses_scores(context)


def refuses_logits(context: HeadContext) -> str:
    """Say why a head cannot give logits token by token: (N, T, D) to (N, T, V), (N, H, W, D) to (N, H, W, V)."""
    if not context.positions or len(context.output_shape) != len(context.shape):
        return "it gives token logits, (N, T, V) from (N, T, D)"
    if context.output_shape[1:-1] != context.positions:
        return (
            f"it gives token logits and cannot know which of the output's {_count(context.output_shape[1:-1])} tokens "
            f"belongs to which of the activation's {_count(context.positions)}"
        )
    return _refuses_one_feature(context) or _refuses_batch(context)


def refuses_dense(context: HeadContext) -> str:
    """Say why a head cannot give dense maps, (N, K, H, W), or with one or three dimensions behind K."""
    sizes, wanted = context.positions, context.output_shape[2:]
    if len(wanted) not in (1, 2, 3):
        return "it gives dense maps, (N, K, H, W) or (N, K, T, H, W)"
    if len(sizes) != len(wanted):
        if len(context.shape) != 3 or context.channels_first or len(wanted) != 2:
            return f"it gives dense maps of as many sides as the activation has, {len(sizes)} and not {len(wanted)}"
        if _token_grid(context) is None:
            return (
                f"it lays tokens out as a map like the output's, and {sizes[0] - _skipped(context)} tokens are none in "
                f"the proportions {wanted[0]} to {wanted[1]}"
            )
    elif len(wanted) == 1 and wanted != sizes:
        return (
            f"it gives dense maps, and of an output with three dimensions it cannot tell which is the classes' unless "
            f"the last is as long as the activation, {sizes[0]}"
        )
    elif len(wanted) > 1 and _in_proportion(sizes, context.output_shape[1:-1]) and not _in_proportion(sizes, wanted):
        return "it gives dense maps with their channels in dimension 1, and this output seems to have them last"
    return _refuses_batch(context)


KINDS = {"linear": refuses_scores, "dense-1": refuses_dense, "logits-1": refuses_logits}
"""A head of each kind of output, the one that asks least of the activation."""


class TokenGrid(nn.Module):
    """Lay tokens out as a map: (N, skip + h * w, D) to (N, D, h, w), row by row, without the first `skip`.

    `size` is the (h, w) of one example; for other numbers of tokens the map keeps its proportions.
    """

    def __init__(self, size: tuple[int, int], skip: int) -> None:
        super().__init__()
        self.proportion, self.skip = size[0] / size[1], skip

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x as a map."""
        x = x[:, self.skip :]
        # torch's own functions: they take the symbols of a tracer too. Half is added, as sym_int rounds down.
        height = torch.sym_int(torch.sym_sqrt(x.shape[1] * self.proportion) + 0.5)
        return x.transpose(1, 2).unflatten(2, (height, -1))


class Resize(nn.Module):
    """Interpolate (N, K, *size) to (N, K, *output_size), linearly; other sizes by the same factors, side by side.

    A side h becomes ``h * output / size``, rounded to the nearest, or up where maps shrink, so that no side vanishes.
    """

    def __init__(self, size: tuple[int, ...], output_size: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.output_size = size, output_size
        self.mode = {2: "bilinear", 3: "trilinear"}[len(size)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the resized maps."""
        size: list[int] = []
        for dim, (given, wanted) in enumerate(zip(self.size, self.output_size, strict=True), start=2):
            # In whole numbers: they are exact, and the symbols of a tracer take part.
            rounding = given // 2 if wanted >= given else given - 1
            size.append((x.shape[dim] * wanted + rounding) // given)
        return F.interpolate(x, size=size, mode=self.mode, align_corners=False)

    def extra_repr(self) -> str:
        """Show the factors."""
        return f"size={self.size}, output_size={self.output_size}"


def _depths(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}-{depth}" for depth in range(1, count + 1))


def _refuses_batch(context: HeadContext) -> str:
    if context.output_shape[0] != context.shape[0]:
        return (
            f"the activation holds {context.shape[0]} examples and the output {context.output_shape[0]}, so it cannot "
            "know which belongs to which"
        )
    return ""


def _refuses_one_feature(context: HeadContext) -> str:
    return "it normalises over the features, and a single one would always come out as 0" * (context.channels == 1)


def _token(context: HeadContext) -> int | None:
    return context.token if len(context.shape) == 3 and not context.channels_first else None


def _skipped(context: HeadContext) -> int:
    # A class token has no place on the map.
    return 1 if context.token == 0 else 0


def _token_grid(context: HeadContext) -> tuple[int, int] | None:
    """Return the (h, w) of the tokens, if there is one in exactly the output's proportions."""
    count, (height, width) = context.positions[0] - _skipped(context), context.output_shape[2:]
    h = math.isqrt(count * height // width)
    return (h, count // h) if h and count % h == 0 and h * width == count // h * height else None


def _in_proportion(sizes: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(size * others[0] == other * sizes[0] for size, other in zip(sizes, others, strict=True))


def _count(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _with_scores(head: nn.Sequential, context: HeadContext) -> nn.Sequential:
    """Return the head, with (N, 1) flattened to (N,) where the output is so."""
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
    return _with_scores(head_layers.linear_head(context.channels, _classes(context), **_layout(context)), context)


def _token_head(context: HeadContext, *, depth: int, attention: bool = False) -> nn.Module:
    how: dict[str, Any] = {"attention": True} if attention else {"token": _token(context)}
    head = head_layers.token_head(context.channels, _classes(context), depth, **_layout(context), **how)
    return _with_scores(head, context)


def _logits_head(context: HeadContext, *, depth: int) -> nn.Module:
    return head_layers.logits_head(context.channels, context.output_shape[-1], depth, **_layout(context))


def _dense_head(context: HeadContext, *, depth: int) -> nn.Module:
    sizes, wanted = context.positions, context.output_shape[2:]
    before: list[nn.Module] = []
    if len(sizes) != len(wanted):
        grid = _token_grid(context)
        assert grid is not None  # or refused
        sizes, before = grid, [TokenGrid(grid, _skipped(context))]
    elif not context.channels_first:
        before = [head_layers.MoveDim(context.channel_dim, 1)]
    after = [Resize(sizes, wanted)] if sizes != wanted else []
    return head_layers.dense_head(
        context.channels, context.output_shape[1], depth, dims=len(sizes), before=before, after=after
    )
