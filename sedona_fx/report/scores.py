"""The picture of the guided search: scores by gradients of all cuts and heads, the best plans, and their rollouts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sedona_fx.plan import Plan
from sedona_fx.report.colors import DARK, GRID, INK, MIDDLE, NEUTRAL, ORANGE, PALER, TEXT
from sedona_fx.report.rounds import draw_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PLANS_SHOWN = 20
_MOST_NUMBERED_ROWS = 20  # of the map: with more, there is no room for numbers in its cells
_MOST_CHARACTERS = 68  # in a line of a plan's cuts
_MOST_LINES = 4

_Pairs = tuple[tuple[str, str], ...]
"""A plan as (cut, head) pairs."""


@dataclass(frozen=True)
class _ShownPlan:
    """A plan of the list: its rank by score, from 1, and its cuts in words, in one or more lines."""

    rank: int
    pairs: _Pairs
    score: float
    text: str


def draw_scores(plan: Plan) -> Figure:
    """Draw a plan of the guided search.

    On the left a map, places (from the input down) by heads: for each (place, head) the cosine of its gradient with
    that of backpropagation; the chosen pairs are framed. (Older plans may hold what a pair adds to the cosine of a
    whole plan instead; the label says which.) On the right the best plans by their scores: the chosen one is dark,
    those that were rolled out are darker than the others. Below these the rollouts, if there were any, as
    :func:`~sedona_fx.report.rounds.draw_losses` draws them.

    Args:
        plan: its provenance has ``places``, ``candidates``, ``scores``, ``plans`` and ``rounds``.
    """
    from matplotlib.figure import Figure

    provenance = plan.provenance
    places: list[str] = provenance["places"]
    heads = list(dict.fromkeys(name for place in places for name in provenance["candidates"][place]))
    chosen = tuple(zip(plan.cuts, map(str, plan.heads), strict=True))
    shown = _shown_plans(provenance["plans"], chosen, len(heads) > 1)
    lines = [line for entry in shown for line in entry.text.split("\n")]

    # Sizes in inches, from the lengths of the texts: the layout makes room for labels, but takes it from the axes.
    numbered = len(places) <= _MOST_NUMBERED_ROWS
    left_width = 0.075 * max(map(len, places)) + 0.48 * max(2, len(heads)) + 1.2
    right_width = 0.066 * max(map(len, lines), default=0) + 2.4
    plans_height, rollouts_height = 0.155 * len(lines) + 1.2, 2.8 if provenance["rounds"] else 0.0
    map_height = (0.22 if numbered else 0.145) * len(places) + 1.5
    width, height = left_width + right_width, max(map_height, plans_height + rollouts_height, 3.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    title = f"{plan.model}: {plan.blocks} blocks, cut behind {', '.join(plan.cuts)}"
    figure.suptitle(textwrap.shorten(title, int(13 * width), placeholder=" …"), x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[left_width, right_width]).flat
    _draw_map(left.subplots(), provenance, heads, chosen)
    if not provenance["rounds"]:
        _draw_plans(right.subplots(), provenance, shown, chosen)
        return figure
    above, below = right.subfigures(2, 1, squeeze=False, height_ratios=[plans_height, rollouts_height]).flat
    _draw_plans(above.subplots(), provenance, shown, chosen)
    losses_axis = below.subplots()
    draw_losses(losses_axis, plan)
    losses_axis.set_title("rollouts of the best", loc="left")
    return figure


def _draw_map(axis: Axes, provenance: Mapping[str, Any], heads: list[str], chosen: _Pairs) -> None:
    """Draw the scores of all (place, head), places from top to bottom; a head that is no candidate leaves a gap."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    places: list[str] = provenance["places"]
    values = [[math.nan] * len(heads) for _ in places]
    for row, place, scores in zip(values, places, provenance["scores"], strict=True):
        for name, score in zip(provenance["candidates"][place], scores, strict=True):
            row[heads.index(name)] = score
    reach = max(abs(score) for scores in provenance["scores"] for score in scores) or 1.0
    colors = LinearSegmentedColormap.from_list("adds", [ORANGE, NEUTRAL, DARK])
    image = axis.imshow(values, cmap=colors, vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    numbered = len(places) <= _MOST_NUMBERED_ROWS
    if numbered:
        digits = 3 if reach >= 0.01 else 4
        for k, row in enumerate(values):
            for m, score in enumerate(row):
                if not math.isnan(score):
                    ink = "white" if abs(score) > 0.6 * reach else INK
                    axis.text(m, k, f"{score:+z.{digits}f}", ha="center", va="center", fontsize="x-small", color=ink)
    for place, head in chosen:
        if head in provenance["candidates"].get(place, ()):
            corner = (heads.index(head) - 0.5, places.index(place) - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", lw=1.8, zorder=3, clip_on=False))
    axis.set_xticks(range(len(heads)), heads, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(places)), places, fontsize=9 if numbered else 7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("framed: chosen", loc="left")
    bar = axis.figure.colorbar(image, ax=axis, aspect=30, pad=0.04)
    measure = "cosine" if provenance.get("score") == "cut" else "adds to the cosine"  # older plans do not say which
    bar.set_label(f"{measure} with\nbackpropagation's gradient")
    bar.outline.set_visible(False)


def _draw_plans(axis: Axes, provenance: Mapping[str, Any], shown: Sequence[_ShownPlan], chosen: _Pairs) -> None:
    """Draw the scores of plans as dots, the best plan on top, with their cuts in words."""
    from matplotlib.ticker import MaxNLocator

    tried = {_pairs(plan) for entry in provenance["rounds"][:1] for plan, _ in entry["scores"]}
    kinds: dict[str, list[tuple[float, float]]] = {"chosen": [], "rolled out": [], "others": []}
    heights: list[float] = []
    bottom = 0.0
    for entry in shown:
        lines = entry.text.count("\n") + 1
        heights.append(bottom + lines / 2)
        bottom += lines
        kind = "chosen" if entry.pairs == chosen else "rolled out" if entry.pairs in tried else "others"
        kinds[kind].append((entry.score, heights[-1]))
    axis.hlines(heights, 0, 1, transform=axis.get_yaxis_transform(), color=GRID, lw=0.8, zorder=1)
    for (kind, points), color, size in zip(kinds.items(), (DARK, MIDDLE, PALER), (8, 5, 5), strict=True):
        if points:
            axis.plot(*zip(*points, strict=True), "o", ms=size, color=color, label=kind, zorder=3)
    axis.margins(x=0.08)
    axis.set_ylim(bottom + 0.2, -0.2)
    axis.yaxis.tick_right()
    axis.set_yticks(heights, [entry.text for entry in shown], fontsize=8)
    for label, entry in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_color(DARK if entry.pairs == chosen else TEXT)
        label.set_fontweight("bold" if entry.pairs == chosen else "normal")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("score by gradients (more is better)")
    axis.set_title("the best plans", loc="left", pad=20)
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, borderpad=0, handletextpad=0)


def _shown_plans(plans: Iterable[Sequence[Any]], chosen: _Pairs, several_heads: bool) -> list[_ShownPlan]:
    """Return the best plans, and the chosen one too if it ranks lower (rollouts may have preferred it)."""
    ranked = [(rank, _pairs(plan), score) for rank, (plan, score) in enumerate(plans, start=1)]
    return [
        _ShownPlan(rank, pairs, score, _in_words(rank, pairs, several_heads))
        for rank, pairs, score in ranked
        if rank <= _PLANS_SHOWN or pairs == chosen
    ]


def _in_words(rank: int, pairs: _Pairs, several_heads: bool) -> str:
    """Return a plan's cuts, with their heads if there is a choice of heads."""
    words = [f"{place} ({head})" if several_heads else place for place, head in pairs]
    # A no-break space keeps a place and its head on one line.
    text = ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)
    lines = textwrap.wrap(text, _MOST_CHARACTERS, max_lines=_MOST_LINES, placeholder=" …", break_long_words=False)
    return "\n".join([f"{rank}. {lines[0]}", *(f"{'':4}{line}" for line in lines[1:])])


def _pairs(plan: Iterable[Sequence[str]]) -> _Pairs:
    return tuple((place, head) for place, head in plan)
