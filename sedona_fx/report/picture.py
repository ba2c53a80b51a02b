"""Pictures as files: how a plan was found, and what plans cost against what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedona_fx.errors import PlanError
from sedona_fx.extras import require
from sedona_fx.files import replacing
from sedona_fx.plan import Plan
from sedona_fx.report.front import draw_front
from sedona_fx.report.rounds import draw_rounds
from sedona_fx.report.scores import draw_scores
from sedona_fx.report.trajectory import draw_trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def plan_picture(plan: Plan, path: str | Path) -> Path:
    """Draw how a plan was found, as a PNG.

    Of SEDONA what it learned (:func:`~sedona_fx.report.trajectory.draw_trajectory`), of the guided search what it
    compared (:func:`~sedona_fx.report.scores.draw_scores`), of a rollout which plans it tried
    (:func:`~sedona_fx.report.rounds.draw_rounds`).

    Returns:
        The path.

    Raises:
        PlanError: the plan does not come from one of these (balanced and uniform plans have no history).
        MissingExtraError: matplotlib is not installed.
    """
    found = plan.provenance
    if found.get("trajectory"):
        draw = draw_trajectory
    elif found.get("scores"):
        draw = draw_scores
    elif found.get("rounds"):
        draw = draw_rounds
    else:
        raise PlanError(f"this plan comes from search={found.get('search')!r} and holds no trajectory to draw")
    return _drawn(lambda: draw(plan), path)


def front_picture(
    tried: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    measure: str,
    title: str,
    path: str | Path,
) -> Path:
    """Draw validation loss against cost as a PNG: all tried plans, and the front as a step line.

    Args:
        tried: (cost in bytes, FLOPs or seconds; loss) of every plan.
        front: of those that no other one beats, the cheapest first; they are numbered from 1.
        measure: what the cost is, one of the limits' names.
        title: above the picture.
        path: of the file.

    Returns:
        The path.
    """
    return _drawn(lambda: draw_front(tried, front, measure, title), path)


def _drawn(draw: Callable[[], Figure], path: str | Path) -> Path:
    """Draw in one style, without a display, and write the PNG whole.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report", purpose="drawing a picture")
    canvas = require("matplotlib.backends.backend_agg", extra="report", purpose="drawing a picture").FigureCanvasAgg
    with matplotlib.rc_context(_STYLE):
        figure = draw()
        canvas(figure)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    return Path(path)
