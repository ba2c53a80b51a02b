"""The picture of SEDONA's search: p_isolate and the heads' weights of the base layers, at the end and over time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan
from sedona_fx.report.colors import DARK, DARKEST, MIDDLE, ORANGE, PALE, PALER, PALEST, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_trajectory(plan: Plan) -> Figure:
    """Draw a plan of a search that learns alpha and beta.

    From top to bottom: one bar per cut point, whose height is the learned p_isolate, with the chosen cuts dark and
    labelled with their heads; the weights of the candidate heads; p_isolate over the meta-iterations; and, if the
    trajectory has them, the mean entropies of both softmaxes as a share of the largest possible, which they have when
    nothing is decided.

    Args:
        plan: its provenance has ``places``, ``candidates`` and ``trajectory``.
    """
    from matplotlib.figure import Figure

    provenance = plan.provenance
    places: list[str] = list(provenance["places"])
    trajectory: list[dict[str, Any]] = provenance["trajectory"]
    entropies = all("entropy_alpha" in point and "entropy_beta" in point for point in trajectory)
    figure = Figure(figsize=(max(7.0, 0.5 * len(places) + 2), 10.2 if entropies else 8.4), layout="constrained")
    axes = figure.subplots(4 if entropies else 3, 1, height_ratios=[3, 2, 2.4, *([1.6] if entropies else [])])
    _draw_isolation(axes[0], plan, places, trajectory[-1]["p_isolate"])
    _draw_heads(axes[1], trajectory[-1]["head_weights"], provenance["candidates"], places)
    _draw_isolation_over_time(axes[2], plan, places, trajectory)
    if entropies:
        _draw_entropies(axes[3], trajectory, [len(provenance["candidates"][place]) for place in places])
    axes[-1].set_xlabel("meta-iteration")
    return figure


def _draw_isolation(axis: Axes, plan: Plan, places: list[str], isolate: list[float]) -> None:
    """Draw p_isolate of every cut point as a bar."""
    chosen = dict(zip(plan.cuts, plan.heads, strict=True))
    colors = [DARK if name in chosen else PALER for name in places]
    # Bars start at 0.5, which favours neither: up means "isolate", down means "let the gradient through".
    axis.bar(range(len(places)), [p - 0.5 for p in isolate], bottom=0.5, color=colors)
    axis.axhline(0.5, color=TEXT, lw=0.8)
    reach = max(max(abs(p - 0.5) for p in isolate), 1e-3)
    axis.set_ylim(0.5 - 1.15 * reach, 0.5 + 1.6 * reach)
    for k, name in enumerate(places):
        if name in chosen:
            height = max(isolate[k], 0.5) + 0.06 * reach
            axis.text(k, height, chosen[name] or "no head", ha="center", va="bottom", rotation=60)
    axis.set_ylabel("p_isolate")
    axis.set_title(f"{plan.model}: {plan.blocks} blocks, cut behind {', '.join(plan.cuts)}", loc="left")
    axis.set_xticks([])


def _draw_heads(axis: Axes, weights: list[list[float]], candidates: dict[str, list[str]], places: list[str]) -> None:
    """Draw the mixture of candidate heads at every cut point as a stacked bar."""
    shades = [PALEST, PALE, MIDDLE, DARK, DARKEST]
    names = list(dict.fromkeys(name for place in places for name in candidates[place]))
    bottom = [0.0] * len(places)
    for m, name in enumerate(names):
        heights = [
            dict(zip(candidates[place], mixture, strict=True)).get(name, 0.0)
            for place, mixture in zip(places, weights, strict=True)
        ]
        axis.bar(range(len(places)), heights, bottom=bottom, color=shades[m % len(shades)], label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set_ylabel("weight of head")
    axis.set_xticks(range(len(places)), places, rotation=60, ha="right")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_isolation_over_time(axis: Axes, plan: Plan, places: list[str], trajectory: list[dict[str, Any]]) -> None:
    """Draw p_isolate of every cut point over the meta-iterations."""
    steps = [point["step"] for point in trajectory]
    for k, name in enumerate(places):
        chosen = name in plan.cuts
        line = [point["p_isolate"][k] for point in trajectory]
        axis.plot(steps, line, color=DARK if chosen else PALER, lw=1.8 if chosen else 0.8, zorder=3 if chosen else 2)
    ends = {name: trajectory[-1]["p_isolate"][k] for k, name in enumerate(places) if name in plan.cuts}
    low, high = axis.get_ylim()
    for name, height in _spread(ends, 0.055 * (high - low)).items():
        axis.annotate(name, (steps[-1], height), xytext=(4, 0), textcoords="offset points", va="center")
    _set_ticks(axis)
    axis.set_ylabel("p_isolate")


def _draw_entropies(axis: Axes, trajectory: list[dict[str, Any]], head_counts: list[int]) -> None:
    """Draw the mean entropies over the meta-iterations, each as a share of the largest possible."""
    steps = [point["step"] for point in trajectory]
    largest = {"alpha": math.log(2), "beta": sum(map(math.log, head_counts)) / len(head_counts)}
    for (name, limit), color in zip(largest.items(), (DARK, ORANGE), strict=True):
        if limit > 0:  # it is 0 if every place has a single candidate: nothing was learned
            axis.plot(steps, [point[f"entropy_{name}"] / limit for point in trajectory], color=color, label=name)
    _set_ticks(axis)
    axis.set_ylabel("entropy\n(1: undecided)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _set_ticks(axis: Axes) -> None:
    """Label whole steps only, and heights as they are, without an offset."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)


def _spread(heights: dict[str, float], distance: float) -> dict[str, float]:
    """Return the heights of labels, moved up until each is `distance` or more above the one below it."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max([height, *(other + distance for other in placed.values())])
    return placed
