"""How a rollout decided: the scores of its plans until they were dropped, and beside them the net as it is cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DARK, _PALE = "#1f4e79", "#9db9d3"


def draw_rounds(plan: Plan) -> Figure:
    """Draw a plan that comes from trying several.

    On the left a line a plan, its validation loss over the training steps, a cross where it was dropped; the chosen one
    is dark. On the right the base layers, the input above, in the colours of the blocks, with the cuts and heads.
    """
    from matplotlib.figure import Figure

    layers = _layers(plan)
    many = len(layers) > 30
    figure = Figure(figsize=(9.0, max(4.2, (0.135 if many else 0.21) * len(layers) + 1.0)), layout="constrained")
    scores, net = figure.subplots(1, 2, width_ratios=[3, 1.25])
    draw_losses(scores, plan)
    _net(net, plan, layers)
    net.tick_params(axis="y", labelsize=6.5 if many else 9)
    return figure


def draw_losses(axis: Axes, plan: Plan) -> None:
    """Draw the plans' losses, round by round; where one was not finite (None) its line has a gap."""
    from matplotlib.ticker import MaxNLocator

    rounds: list[dict[str, Any]] = plan.provenance["rounds"]
    lines: dict[tuple[tuple[str, str], ...], list[tuple[int, float]]] = {}
    for entry in rounds:
        for tried, score in entry["scores"]:
            key = tuple((cut, head) for cut, head in tried)
            lines.setdefault(key, []).append((entry["step"], math.nan if score is None else score))
    best = tuple(zip(plan.cuts, map(str, plan.heads), strict=True))
    last = rounds[-1]["step"]
    for key, line in lines.items():
        if key != best:
            steps, losses = zip(*line, strict=True)
            axis.plot(steps, losses, color=_PALE, lw=0.9, zorder=2)
            axis.plot(steps[-1:], losses[-1:], "x" if steps[-1] < last else ".", color=_PALE, ms=4.5, zorder=2)
    if best in lines:
        steps, losses = zip(*lines[best], strict=True)
        axis.plot(steps, losses, "o-", color=_DARK, lw=2.0, ms=5, zorder=3, label="chosen")
        axis.annotate(
            f"{losses[-1]:.4g}", (steps[-1], losses[-1]), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axis.plot([], [], "x", color=_PALE, label="dropped")
    axis.set_xlim(left=0)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training steps")
    axis.set_ylabel("validation loss of the final output")
    axis.set_title(f"{plan.model}: {plan.blocks} blocks, the best of {len(lines)} plans", loc="left")
    axis.legend(loc="best", frameon=False)


def _net(axis: Axes, plan: Plan, layers: list[str]) -> None:
    """Draw the base layers from above to below, and the chosen cuts between them."""
    chosen = dict(zip(plan.cuts, plan.heads, strict=True))
    block = 0
    for k, name in enumerate(layers):
        axis.barh(k, 1.0, height=0.86, color=(_PALE, "#dbe7f1")[block % 2])
        if name in chosen:
            axis.plot([0, 1.08], [k + 0.5, k + 0.5], color=_DARK, lw=2.0, clip_on=False)
            axis.text(1.12, k + 0.5, chosen[name] or "no head", va="center", color=_DARK)
            block += 1
    axis.set_xlim(0, 2.0)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_yticks(range(len(layers)), layers)
    axis.tick_params(left=False)
    axis.set_xticks([])
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _layers(plan: Plan) -> list[str]:
    """Return the base layers by the cut points behind them, the last one by what it leads to."""
    known = list(plan.base_layers) if set(plan.cuts) <= set(plan.base_layers) else list(plan.cuts)
    return [*known, "output"]
