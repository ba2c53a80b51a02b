"""Pictures as PNG files: how a plan was found, and validation loss against cost for many plans."""

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
    """Draw how a plan was found, as a PNG file.

    What is drawn depends on the search: for SEDONA what it learned
    (:func:`~sedona_fx.report.trajectory.draw_trajectory`), for the guided search what it compared
    (:func:`~sedona_fx.report.scores.draw_scores`), for a rollout which plans it tried
    (:func:`~sedona_fx.report.rounds.draw_rounds`).

    Args:
        plan: made by one of these searches.
        path: of the file; it is replaced whole.

    Returns:
        The path.

    Raises:
        PlanError: the plan comes from another search (balanced and uniform plans have no history).
        MissingExtraError: matplotlib is not installed.
    """
    provenance = plan.provenance
    if provenance.get("trajectory"):
        draw = draw_trajectory
    elif provenance.get("scores"):
        draw = draw_scores
    elif provenance.get("rounds"):
        draw = draw_rounds
    else:
        raise PlanError(f"this plan comes from search={provenance.get('search')!r} and holds no trajectory to draw")
    return _save(lambda: draw(plan), path)


def front_picture(
    tried: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    measure: str,
    title: str,
    path: str | Path,
) -> Path:
    """Draw validation loss against cost, as a PNG file.

    All tried plans are dots, and the front is a step line (:func:`~sedona_fx.report.front.draw_front`).

    Args:
        tried: (cost in bytes, FLOPs or seconds; loss) of every plan.
        front: those that no other plan beats, the cheapest first; they are numbered from 1.
        measure: what the cost is, one of the names of the limits.
        title: of the picture.
        path: of the file; it is replaced whole.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return _save(lambda: draw_front(tried, front, measure, title), path)


def _save(draw: Callable[[], Figure], path: str | Path) -> Path:
    """Draw a figure in the style of all pictures, without a display, and write it."""
    matplotlib = require("matplotlib", extra="report", purpose="drawing a picture")
    canvas = require("matplotlib.backends.backend_agg", extra="report", purpose="drawing a picture").FigureCanvasAgg
    with matplotlib.rc_context(_STYLE):
        figure = draw()
        canvas(figure)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    return Path(path)
