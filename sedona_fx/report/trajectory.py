"""What SEDONA learned: p_isolate and the weights of the heads by base layer, and their way there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DARK, _PALE = "#1f4e79", "#b8cce0"


def draw_trajectory(plan: Plan) -> Figure:
    """Draw a plan that comes from a search with alphas.

    From above: a bar a cut point, its height the learned p_isolate, the chosen cuts dark with the names of their heads;
    the weights of the candidate heads; p_isolate over the meta-iterations; the mean entropies of both softmaxes, where
    the trajectory has them, as a share of what they were when nothing was known.
    """
    from matplotlib.figure import Figure

    found = plan.provenance
    places: list[str] = list(found["places"])
    trajectory: list[dict[str, Any]] = found["trajectory"]
    entropies = all("entropy_alpha" in point and "entropy_beta" in point for point in trajectory)
    figure = Figure(figsize=(max(7.0, 0.5 * len(places) + 2), 10.2 if entropies else 8.4), layout="constrained")
    axes = figure.subplots(4 if entropies else 3, 1, height_ratios=[3, 2, 2.4, *([1.6] if entropies else [])])
    _isolation(axes[0], plan, places, trajectory[-1]["p_isolate"])
    _heads(axes[1], trajectory[-1]["head_weights"], found["candidates"], places)
    _way(axes[2], plan, places, trajectory)
    if entropies:
        _entropies(axes[3], trajectory, [len(found["candidates"][place]) for place in places])
    axes[-1].set_xlabel("meta-iteration")
    return figure


def _isolation(axis: Axes, plan: Plan, places: list[str], isolate: list[float]) -> None:
    """Draw p_isolate of every cut point as a bar."""
    chosen = dict(zip(plan.cuts, plan.heads, strict=True))
    colors = [_DARK if name in chosen else _PALE for name in places]
    # Bars start at 0.5, where the search knows nothing: up is "isolate", down is "let through".
    axis.bar(range(len(places)), [p - 0.5 for p in isolate], bottom=0.5, color=colors)
    axis.axhline(0.5, color="#444444", lw=0.8)
    reach = max(max(abs(p - 0.5) for p in isolate), 1e-3)
    axis.set_ylim(0.5 - 1.15 * reach, 0.5 + 1.6 * reach)
    for k, name in enumerate(places):
        if name in chosen:
            height = max(isolate[k], 0.5) + 0.06 * reach
            axis.text(k, height, chosen[name] or "no head", ha="center", va="bottom", rotation=60)
    axis.set_ylabel("p_isolate")
    axis.set_title(f"{plan.model}: {plan.blocks} blocks, cut behind {', '.join(plan.cuts)}", loc="left")
    axis.set_xticks([])


def _heads(axis: Axes, weights: list[list[float]], candidates: dict[str, list[str]], places: list[str]) -> None:
    """Draw the mixture of candidate heads at every cut point as a stacked bar."""
    shades = ["#dbe7f1", "#9db9d3", "#5b89b4", "#1f4e79", "#0b2540"]
    names = list(dict.fromkeys(name for place in places for name in candidates[place]))
    base = [0.0] * len(places)
    for m, name in enumerate(names):
        heights = [
            dict(zip(candidates[place], mixture, strict=True)).get(name, 0.0)
            for place, mixture in zip(places, weights, strict=True)
        ]
        axis.bar(range(len(places)), heights, bottom=base, color=shades[m % len(shades)], label=name)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    axis.set_ylabel("weight of head")
    axis.set_xticks(range(len(places)), places, rotation=60, ha="right")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _way(axis: Axes, plan: Plan, places: list[str], trajectory: list[dict[str, Any]]) -> None:
    """Draw p_isolate of every cut point over the meta-iterations."""
    steps = [point["step"] for point in trajectory]
    for k, name in enumerate(places):
        dark = name in plan.cuts
        line = [point["p_isolate"][k] for point in trajectory]
        axis.plot(steps, line, color=_DARK if dark else _PALE, lw=1.8 if dark else 0.8, zorder=3 if dark else 2)
    ends = {name: trajectory[-1]["p_isolate"][k] for k, name in enumerate(places) if name in plan.cuts}
    low, high = axis.get_ylim()
    for name, height in _apart(ends, 0.055 * (high - low)).items():
        axis.annotate(name, (steps[-1], height), xytext=(4, 0), textcoords="offset points", va="center")
    _plain_ticks(axis)
    axis.set_ylabel("p_isolate")


def _entropies(axis: Axes, trajectory: list[dict[str, Any]], kinds: list[int]) -> None:
    """Draw the mean entropies over the meta-iterations, each as a share of the largest possible."""
    steps = [point["step"] for point in trajectory]
    most = {"alpha": math.log(2), "beta": sum(map(math.log, kinds)) / len(kinds)}
    for (name, limit), color in zip(most.items(), (_DARK, "#c07a2c"), strict=True):
        if limit > 0:  # a single candidate everywhere leaves nothing to learn
            axis.plot(steps, [point[f"entropy_{name}"] / limit for point in trajectory], color=color, label=name)
    _plain_ticks(axis)
    axis.set_ylabel("entropy\n(1: undecided)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _plain_ticks(axis: Axes) -> None:
    """Label whole steps only, and heights in full."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)


def _apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """Move labels up until no two are nearer than `least`."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max([height, *(other + least for other in placed.values())])
    return placed
