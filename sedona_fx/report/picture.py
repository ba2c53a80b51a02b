"""Pictures of a plan: where the search would isolate, where it cut, and how it got there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedona_fx.files import replacing

if TYPE_CHECKING:
    from sedona_fx.plan import Plan


def plan_picture(plan: Plan, path: str | Path) -> Path:
    """Draw a plan found by SEDONA as a PNG: p_isolate and the heads by base layer, and their way there.

    Above: a bar a cut point, its height the learned p_isolate; chosen cuts are dark and carry their head's name. In the
    middle: the weights of the candidate heads. Below: p_isolate over the meta-iterations.

    Returns:
        The path.

    Raises:
        ValueError: the plan does not come from a search with alphas (balanced and uniform plans have none).
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = plan.provenance
    if not found.get("trajectory"):
        raise ValueError(f"this plan comes from search={found.get('search')!r} and holds no trajectory to draw")
    places: list[str] = list(found["places"])
    last: dict[str, Any] = found["trajectory"][-1]
    steps = [point["step"] for point in found["trajectory"]]
    chosen = dict(zip(plan.cuts, plan.heads, strict=True))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(max(7.0, 0.5 * len(places) + 2), 8.4), layout="constrained")
        FigureCanvasAgg(figure)
        top, middle, bottom = figure.subplots(3, 1, height_ratios=[3, 2, 2.4])
        where = range(len(places))
        isolate = last["p_isolate"]
        colors = ["#1f4e79" if name in chosen else "#b8cce0" for name in places]
        # Bars start at 0.5, where the search knows nothing: up is "isolate", down is "let through".
        top.bar(where, [p - 0.5 for p in isolate], bottom=0.5, color=colors)
        top.axhline(0.5, color="#444444", lw=0.8)
        reach = max(max(abs(p - 0.5) for p in isolate), 1e-3)
        top.set_ylim(0.5 - 1.15 * reach, 0.5 + 1.6 * reach)
        for k, name in enumerate(places):
            if name in chosen:
                height = max(isolate[k], 0.5) + 0.06 * reach
                top.text(k, height, chosen[name] or "no head", ha="center", va="bottom", rotation=60)
        top.set_ylabel("p_isolate")
        top.set_title(f"{plan.model}: {plan.blocks} blocks, cut behind {', '.join(plan.cuts)}", loc="left")
        top.set_xticks([])
        _draw_heads(middle, last["head_weights"], found["candidates"], places)
        for k, name in enumerate(places):
            line = [point["p_isolate"][k] for point in found["trajectory"]]
            style = {"color": "#1f4e79", "lw": 1.8} if name in chosen else {"color": "#b8cce0", "lw": 0.8}
            bottom.plot(steps, line, **style)
        ends = {name: isolate[k] for k, name in enumerate(places) if name in chosen}
        for name, height in _apart(ends, 0.055 * (bottom.get_ylim()[1] - bottom.get_ylim()[0])).items():
            bottom.annotate(name, (steps[-1], height), xytext=(4, 0), textcoords="offset points", va="center")
        bottom.set_xlabel("meta-iteration")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_ylabel("p_isolate")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    return Path(path)


def _apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """Move labels up until no two are nearer than `least`."""
    placed: dict[str, float] = {}
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max([height, *(other + least for other in placed.values())])
    return placed


def _draw_heads(axis: Any, weights: list[list[float]], candidates: dict[str, list[str]], places: list[str]) -> None:
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
