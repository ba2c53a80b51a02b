"""The picture of a rollout: the losses of its plans until they were dropped, and the net as it is cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan
from sedona_fx.report.colors import DARK, PALE, PALEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rounds(plan: Plan) -> Figure:
    """Draw a plan that was chosen by training several for a while.

    On the left, one line per plan: its validation loss over the training steps, with a cross where the plan was
    dropped; the line of the chosen plan is dark. On the right, the base layers from the input (above) to the output,
    in two alternating colours for the blocks, with the cuts and heads.

    Args:
        plan: its provenance has ``rounds``, a list of ``{"step": s, "scores": [[[[cut, head], ...], loss], ...]}``.
    """
    from matplotlib.figure import Figure

    layers = _layers(plan)
    many = len(layers) > 30
    figure = Figure(figsize=(9.0, max(4.2, (0.135 if many else 0.21) * len(layers) + 1.0)), layout="constrained")
    losses_axis, net_axis = figure.subplots(1, 2, width_ratios=[3, 1.25])
    draw_losses(losses_axis, plan)
    _draw_net(net_axis, plan, layers)
    net_axis.tick_params(axis="y", labelsize=6.5 if many else 9)
    return figure


def draw_losses(axis: Axes, plan: Plan) -> None:
    """Draw the losses of the plans, round by round. Where a loss was not finite (None) the line has a gap."""
    from matplotlib.ticker import MaxNLocator

    rounds: list[dict[str, Any]] = plan.provenance["rounds"]
    lines: dict[tuple[tuple[str, str], ...], list[tuple[int, float]]] = {}
    for entry in rounds:
        for tried, loss in entry["scores"]:
            pairs = tuple((cut, head) for cut, head in tried)
            lines.setdefault(pairs, []).append((entry["step"], math.nan if loss is None else loss))
    chosen = tuple(zip(plan.cuts, map(str, plan.heads), strict=True))
    last_step = rounds[-1]["step"]
    for pairs, line in lines.items():
        if pairs != chosen:
            steps, losses = zip(*line, strict=True)
            axis.plot(steps, losses, color=PALE, lw=0.9, zorder=2)
            axis.plot(steps[-1:], losses[-1:], "x" if steps[-1] < last_step else ".", color=PALE, ms=4.5, zorder=2)
    if chosen in lines:
        steps, losses = zip(*lines[chosen], strict=True)
        axis.plot(steps, losses, "o-", color=DARK, lw=2.0, ms=5, zorder=3, label="chosen")
        axis.annotate(
            f"{losses[-1]:.4g}", (steps[-1], losses[-1]), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axis.plot([], [], "x", color=PALE, label="dropped")
    axis.set_xlim(left=0)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training steps")
    axis.set_ylabel("validation loss of the final output")
    axis.set_title(f"{plan.model}: {plan.blocks} blocks, the best of {len(lines)} plans", loc="left")
    axis.legend(loc="best", frameon=False)


def _draw_net(axis: Axes, plan: Plan, layers: list[str]) -> None:
    """Draw the base layers from top to bottom, and the chosen cuts between them."""
    chosen = dict(zip(plan.cuts, plan.heads, strict=True))
    block = 0
    for k, name in enumerate(layers):
        axis.barh(k, 1.0, height=0.86, color=(PALE, PALEST)[block % 2])
        if name in chosen:
            axis.plot([0, 1.08], [k + 0.5, k + 0.5], color=DARK, lw=2.0, clip_on=False)
            axis.text(1.12, k + 0.5, chosen[name] or "no head", va="center", color=DARK)
            block += 1
    axis.set_xlim(0, 2.0)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_yticks(range(len(layers)), layers)
    axis.tick_params(left=False)
    axis.set_xticks([])
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def _layers(plan: Plan) -> list[str]:
    """Return names for the base layers: the cut points at their ends, and "output" for the last one.

    If a cut is no end of a base layer, only the cuts of the plan are shown.
    """
    names = list(plan.base_layers) if set(plan.cuts) <= set(plan.base_layers) else list(plan.cuts)
    return [*names, "output"]
