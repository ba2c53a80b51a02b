"""What plans cost against what they are worth: every tried plan, and the front as a step line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sedona_fx.report.text import in_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DARK, _PALE = "#1f4e79", "#9db9d3"
_NAMES = {
    "activation_bytes": "activations of the largest block",
    "block_flops": "forward FLOPs of the largest block",
    "block_seconds": "training step of the slowest block",
    "head_flops": "forward FLOPs of all heads",
}


def draw_front(
    tried: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], measure: str, title: str
) -> Figure:
    """Draw validation loss over cost. Losses far above the rest are arrows at the upper edge, so that the front shows.

    Args:
        tried: (cost in bytes, FLOPs or seconds; loss) of every plan.
        front: of those that no other one beats, the cheapest first; they are numbered from 1.
        measure: what the cost is, one of the limits' names.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    others = [(cost, loss) for cost, loss in tried if math.isfinite(loss) and (cost, loss) not in front]
    costs, unit = in_units(measure, [cost for cost, _ in [*front, *others]])
    xs, losses = costs[: len(front)], [loss for _, loss in front]
    pale = list(zip(costs[len(front) :], [loss for _, loss in others], strict=True))
    top = _top([loss for _, loss in others], losses)
    low = [(x, loss) for x, loss in pale if loss <= top]
    high = [x for x, loss in pale if loss > top]

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.scatter([x for x, _ in low], [loss for _, loss in low], s=22, color=_PALE, label="tried", zorder=2)
    if high:
        label = f"tried, loss above {top:.2g}"
        axis.scatter(high, [top] * len(high), s=26, marker="^", color=_PALE, label=label, zorder=2)
    right = max(costs)
    axis.step([*xs, right], [*losses, losses[-1]], where="post", color=_DARK, lw=1.6, zorder=3)
    axis.scatter(xs, losses, s=38, color=_DARK, label="front", zorder=4)
    if min(costs) > 0 and right / min(costs) > 20:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(0.08)
    figure.draw_without_rendering()  # fixes the axes, in which labels are kept apart
    placed: list[tuple[float, float]] = []
    for k, at in enumerate(zip(xs, losses, strict=True), start=1):
        x, y = axis.transData.transform(at)
        x, y = x - 5, y - 9
        while any(abs(x - a) < 12 and abs(y - b) < 14 for a, b in placed):
            y -= 14
        placed.append((x, y))
        where = axis.transData.inverted().transform((x, y))
        axis.annotate(str(k), (float(where[0]), float(where[1])), ha="right", va="top", color=_DARK)
    axis.set_xlabel(f"{_NAMES[measure]}, {unit}")
    axis.set_ylabel("validation loss of the final output")
    axis.set_title(title, loc="left")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _top(others: Sequence[float], front: Sequence[float]) -> float:
    """Return the loss from which on plans are drawn as arrows: far above the middle one, and above all of the front."""
    losses = sorted([*others, *front])
    least, middle = losses[0], losses[len(losses) // 2]
    top = max(least + 2.5 * (middle - least), max(front))
    return max((loss for loss in losses if loss <= top), default=top) + 0.05 * (top - least)
