"""The picture of a front: validation loss against cost, every tried plan as a dot and the front as a step line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sedona_fx.report.colors import DARK, PALE
from sedona_fx.report.text import in_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COST_LABELS = {
    "activation_bytes": "activations of the largest block",
    "block_flops": "forward FLOPs of the largest block",
    "block_seconds": "training step of the slowest block",
    "head_flops": "forward FLOPs of all heads",
}


def draw_front(
    tried: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], measure: str, title: str
) -> Figure:
    """Draw validation loss over cost.

    Plans whose loss is far above the others' are arrows at the upper edge, so that the front stays readable. Plans
    whose loss is not finite are left out.

    Args:
        tried: (cost in bytes, FLOPs or seconds; loss) of every plan.
        front: those that no other plan beats, the cheapest first; they are numbered from 1.
        measure: what the cost is, one of the names of the limits.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    others = [(cost, loss) for cost, loss in tried if math.isfinite(loss) and (cost, loss) not in front]
    costs, unit = in_units(measure, [cost for cost, _ in [*front, *others]])
    front_costs, front_losses = costs[: len(front)], [loss for _, loss in front]
    other_points = list(zip(costs[len(front) :], [loss for _, loss in others], strict=True))
    top = _top([loss for _, loss in others], front_losses)
    shown = [(cost, loss) for cost, loss in other_points if loss <= top]
    above = [cost for cost, loss in other_points if loss > top]

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.scatter([cost for cost, _ in shown], [loss for _, loss in shown], s=22, color=PALE, label="tried", zorder=2)
    if above:
        label = f"tried, loss above {top:.2g}"
        axis.scatter(above, [top] * len(above), s=26, marker="^", color=PALE, label=label, zorder=2)
    right = max(costs)
    axis.step([*front_costs, right], [*front_losses, front_losses[-1]], where="post", color=DARK, lw=1.6, zorder=3)
    axis.scatter(front_costs, front_losses, s=38, color=DARK, label="front", zorder=4)
    if min(costs) > 0 and right / min(costs) > 20:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(0.08)
    figure.draw_without_rendering()  # fixes the axes: the numbers are placed by their distance in pixels
    _number(axis, list(zip(front_costs, front_losses, strict=True)))
    axis.set_xlabel(f"{_COST_LABELS[measure]}, {unit}")
    axis.set_ylabel("validation loss of the final output")
    axis.set_title(title, loc="left")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _number(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write numbers beside points, from 1, each moved down until it covers none of those before."""
    placed: list[tuple[float, float]] = []  # in pixels
    for number, point in enumerate(points, start=1):
        x, y = axis.transData.transform(point)
        x, y = x - 5, y - 9
        while any(abs(x - other_x) < 12 and abs(y - other_y) < 14 for other_x, other_y in placed):
            y -= 14
        placed.append((x, y))
        where = axis.transData.inverted().transform((x, y))
        axis.annotate(str(number), (float(where[0]), float(where[1])), ha="right", va="top", color=DARK)


def _top(others: Sequence[float], front: Sequence[float]) -> float:
    """Return the loss above which plans are drawn as arrows: far above the median, and above all of the front."""
    losses = sorted([*others, *front])
    least, median = losses[0], losses[len(losses) // 2]
    top = max(least + 2.5 * (median - least), max(front))
    return max((loss for loss in losses if loss <= top), default=top) + 0.05 * (top - least)
