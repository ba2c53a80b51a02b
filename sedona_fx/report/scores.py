"""How gradients pruned: what every cut and head adds to the score, the best plans, and the rollouts among them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan
from sedona_fx.report.rounds import draw_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DARK, _MIDDLE, _PALE = "#1f4e79", "#5b89b4", "#b8cce0"
_ORANGE = "#c07a2c"  # with the blues, told apart by all kinds of colour vision
_LISTED = 20
_WRITTEN = 20  # rows of the map, up to which numbers stand in its cells
_WIDEST = 68  # characters in a line of a plan's cuts
_MOST_LINES = 4

_Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Ranked:
    """A plan among others by its score, the best one first."""

    rank: int
    pairs: _Pairs
    score: float
    text: str  # its cuts in words, in lines


def draw_scores(plan: Plan) -> Figure:
    """Draw a plan that comes from the guided search.

    On the left a map, places (from the input down) by heads: for each (place, head) the cosine of its gradient with
    that of backpropagation; the chosen pairs are framed. (Older plans may hold what a pair adds to the cosine of a whole
    plan instead; the label says which.) On the right the best plans by their scores, the chosen one dark, those that
    were rolled out darker than the others. Below these the rollouts, if there were any, as
    :func:`~sedona_fx.report.rounds.draw_losses` draws them.
    """
    from matplotlib.figure import Figure

    found = plan.provenance
    places: list[str] = found["places"]
    heads = list(dict.fromkeys(name for place in places for name in found["candidates"][place]))
    chosen = tuple(zip(plan.cuts, map(str, plan.heads), strict=True))
    listed = _listed(found["plans"], chosen, len(heads) > 1)
    lines = [line for entry in listed for line in entry.text.split("\n")]

    # Inches, by what is to be read: the layout makes room for labels, but takes it from the axes.
    written = len(places) <= _WRITTEN
    left = 0.075 * max(map(len, places)) + 0.48 * max(2, len(heads)) + 1.2
    right = 0.066 * max(map(len, lines), default=0) + 2.4
    best, rollouts = 0.155 * len(lines) + 1.2, 2.8 if found["rounds"] else 0.0
    height = max((0.22 if written else 0.145) * len(places) + 1.5, best + rollouts, 3.2)
    figure = Figure(figsize=(left + right, height), layout="constrained")
    title = f"{plan.model}: {plan.blocks} blocks, cut behind {', '.join(plan.cuts)}"
    figure.suptitle(textwrap.shorten(title, int(13 * (left + right)), placeholder=" …"), x=0.01, ha="left")
    on_the_left, on_the_right = figure.subfigures(1, 2, squeeze=False, width_ratios=[left, right]).flat
    _map(on_the_left.subplots(), found, heads, chosen)
    if not found["rounds"]:
        _dots(on_the_right.subplots(), found, listed, chosen)
        return figure
    above, below = on_the_right.subfigures(2, 1, squeeze=False, height_ratios=[best, rollouts]).flat
    _dots(above.subplots(), found, listed, chosen)
    losses = below.subplots()
    draw_losses(losses, plan)
    losses.set_title("rollouts of the best", loc="left")
    return figure


def _map(axis: Axes, found: Mapping[str, Any], heads: list[str], chosen: _Pairs) -> None:
    """Draw the scores of all (place, head), places from above to below; where a head is no candidate it is empty."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    places: list[str] = found["places"]
    values = [[math.nan] * len(heads) for _ in places]
    for row, place, scores in zip(values, places, found["scores"], strict=True):
        for name, score in zip(found["candidates"][place], scores, strict=True):
            row[heads.index(name)] = score
    reach = max(abs(score) for scores in found["scores"] for score in scores) or 1.0
    colors = LinearSegmentedColormap.from_list("adds", [_ORANGE, "#f7f7f7", _DARK])
    image = axis.imshow(values, cmap=colors, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    written = len(places) <= _WRITTEN
    if written:
        digits = 3 if reach >= 0.01 else 4
        for k, row in enumerate(values):
            for m, score in enumerate(row):
                if not math.isnan(score):
                    ink = "white" if abs(score) > 0.6 * reach else "#222222"
                    axis.text(m, k, f"{score:+z.{digits}f}", ha="center", va="center", fontsize="x-small", color=ink)
    for place, head in chosen:
        if head in found["candidates"].get(place, ()):
            corner = (heads.index(head) - 0.5, places.index(place) - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", lw=1.8, zorder=3, clip_on=False))
    axis.set_xticks(range(len(heads)), heads, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(places)), places, fontsize=9 if written else 7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("framed: chosen", loc="left")
    bar = axis.figure.colorbar(image, ax=axis, aspect=30, pad=0.04)
    says = "cosine" if found.get("score") == "cut" else "adds to the cosine"  # older plans do not say which it was
    bar.set_label(f"{says} with\nbackpropagation's gradient")
    bar.outline.set_visible(False)


def _dots(axis: Axes, found: Mapping[str, Any], listed: Sequence[_Ranked], chosen: _Pairs) -> None:
    """Draw plans' scores as dots, the best one above, with their cuts in words."""
    from matplotlib.ticker import MaxNLocator

    tried = {_pairs(plan) for entry in found["rounds"][:1] for plan, _ in entry["scores"]}
    kinds: dict[str, list[tuple[float, float]]] = {"chosen": [], "rolled out": [], "others": []}
    heights: list[float] = []
    below = 0.0
    for entry in listed:
        lines = entry.text.count("\n") + 1
        heights.append(below + lines / 2)
        below += lines
        kind = "chosen" if entry.pairs == chosen else "rolled out" if entry.pairs in tried else "others"
        kinds[kind].append((entry.score, heights[-1]))
    axis.hlines(heights, 0, 1, transform=axis.get_yaxis_transform(), color="#e4e4e4", lw=0.8, zorder=1)
    for (kind, points), color, size in zip(kinds.items(), (_DARK, _MIDDLE, _PALE), (8, 5, 5), strict=True):
        if points:
            axis.plot(*zip(*points, strict=True), "o", ms=size, color=color, label=kind, zorder=3)
    axis.margins(x=0.08)
    axis.set_ylim(below + 0.2, -0.2)
    axis.yaxis.tick_right()
    axis.set_yticks(heights, [entry.text for entry in listed], fontsize=8)
    for label, entry in zip(axis.get_yticklabels(), listed, strict=True):
        label.set_color(_DARK if entry.pairs == chosen else "#444444")
        label.set_fontweight("bold" if entry.pairs == chosen else "normal")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("score by gradients (more is better)")
    axis.set_title("the best plans", loc="left", pad=20)
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderpad=0, handletextpad=0)


def _listed(plans: Iterable[Sequence[Any]], chosen: _Pairs, several_heads: bool) -> list[_Ranked]:
    """Return the best plans; the chosen one also where rollouts raised it from farther below."""
    ranked = [(rank, _pairs(plan), score) for rank, (plan, score) in enumerate(plans, start=1)]
    kept = [entry for entry in ranked if entry[0] <= _LISTED or entry[1] == chosen]
    return [_Ranked(*entry, _in_words(*entry[:2], several_heads)) for entry in kept]


def _in_words(rank: int, pairs: _Pairs, several_heads: bool) -> str:
    """Return a plan's cuts, with their heads where there is a choice of them."""
    words = [f"{place} ({head})" if several_heads else place for place, head in pairs]
    # A no-break space holds a place and its head together.
    text = ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)
    lines = textwrap.wrap(text, _WIDEST, max_lines=_MOST_LINES, placeholder=" …", break_long_words=False)
    return "\n".join([f"{rank}. {lines[0]}", *(f"{'':4}{line}" for line in lines[1:])])


def _pairs(plan: Iterable[Sequence[str]]) -> _Pairs:
    return tuple((place, head) for place, head in plan)
