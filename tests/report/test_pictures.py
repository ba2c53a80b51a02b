"""Pictures of plans: what is drawn is what the plan's provenance says."""

import math
import struct

import pytest

from sedona_fx import Plan
from sedona_fx.errors import PlanError
from sedona_fx.report import plan_picture
from sedona_fx.report.rounds import draw_rounds
from sedona_fx.report.trajectory import draw_trajectory

LAYERS = ("a", "b", "c", "d")
HEADS = ["linear", "mlp"]


def tried(*cuts):
    return [list(cut) for cut in cuts]


ONE, TWO, THREE = (
    tried(("a", "mlp"), ("c", "linear")),
    tried(("b", "mlp"), ("d", "mlp")),
    tried(("a", "mlp"), ("d", "mlp")),
)
ROLLOUT = Plan(
    cuts=("b", "d"),
    heads=("mlp", "mlp"),
    model="Net",
    base_layers=LAYERS,
    provenance={
        "search": "rollout",
        "rounds": [
            {"step": 3, "scores": [[ONE, 2.0], [TWO, 2.5], [THREE, math.inf]]},
            {"step": 6, "scores": [[TWO, 1.5], [ONE, 1.75]]},
            {"step": 12, "scores": [[TWO, 1.25]]},
        ],
    },
)


def point(step, **more):
    isolate = [0.5 + 0.01 * step, 0.5, 0.5 - 0.01 * step, 0.5 + 0.02 * step]
    return {"step": step, "val_loss": 1.0, "p_isolate": isolate, "head_weights": [[0.25, 0.75]] * 4, **more}


def sedona(points):
    return Plan(
        cuts=("a", "d"),
        heads=("mlp", None),
        model="Net",
        base_layers=LAYERS,
        provenance={
            "search": "sedona",
            "places": list(LAYERS),
            "candidates": dict.fromkeys(LAYERS, HEADS),
            "trajectory": points,
        },
    )


def lines(axis):
    """Return the drawn lines with data, by their points."""
    found = [list(zip(*(map(float, values) for values in line.get_data()), strict=True)) for line in axis.get_lines()]
    return [points for points in found if points]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_a_line_a_plan_that_stops_where_it_was_dropped():
    scores, net = draw_rounds(ROLLOUT).axes
    drawn = lines(scores)
    assert [(3, 2.0), (6, 1.75)] in drawn
    assert [(6, 1.75)] in drawn  # its cross
    assert [(3, 2.5), (6, 1.5), (12, 1.25)] in drawn
    assert [len(points) for points in drawn if any(math.isnan(loss) for _, loss in points)] == [1, 1]
    (chosen,) = [line for line in scores.get_lines() if line.get_label() == "chosen"]
    assert list(chosen.get_ydata()) == [2.5, 1.5, 1.25]
    assert chosen.get_linewidth() == max(line.get_linewidth() for line in scores.get_lines())
    assert scores.get_title(loc="left") == "Net: 3 blocks, the best of 3 plans"
    assert "1.25" in texts(scores)
    assert [label.get_text() for label in net.get_yticklabels()] == ["a", "b", "c", "d", "output"]
    assert [points[0][1] for points in lines(net)] == [1.5, 3.5]  # below b, the second row, and below d, the fourth
    assert texts(net) == ["mlp", "mlp"]
    colors = [bar.get_facecolor() for bar in net.patches]
    assert [colors.index(color) for color in colors] == [0, 0, 2, 2, 0]


def test_a_plan_that_was_read_back_is_drawn_alike(tmp_path):
    ROLLOUT.save(tmp_path / "plan.json")
    ours, theirs = (draw_rounds(plan).axes[0] for plan in (ROLLOUT, Plan.load(tmp_path / "plan.json")))
    assert repr(lines(ours)) == repr(lines(theirs))
    assert plan_picture(Plan.load(tmp_path / "plan.json"), tmp_path / "plan.png").exists()


def test_cuts_that_end_no_base_layer_are_all_that_is_drawn_of_the_net():
    odd = Plan(cuts=("x", "y"), heads=("mlp", None), base_layers=LAYERS, provenance=ROLLOUT.provenance)
    scores, net = draw_rounds(odd).axes
    assert [label.get_text() for label in net.get_yticklabels()] == ["x", "y", "output"]
    assert texts(net) == ["mlp", "no head"]
    assert "chosen" not in [line.get_label() for line in scores.get_lines()]


def test_sedonas_trajectory_and_entropy():
    bare = draw_trajectory(sedona([point(0), point(5)]))
    assert len(bare.axes) == 3
    known = {"entropy_alpha": math.log(2), "entropy_beta": math.log(2)}
    found = {"entropy_alpha": 0.5 * math.log(2), "entropy_beta": 0.25 * math.log(2)}
    top, middle, way, entropy = draw_trajectory(sedona([point(0, **known), point(5, **found)])).axes
    assert [round(bar.get_height(), 9) for bar in top.patches] == [0.05, 0.0, -0.05, 0.1]
    assert texts(top) == ["mlp", "no head"]
    assert [round(bar.get_height(), 9) for bar in middle.patches] == [0.25] * 4 + [0.75] * 4
    assert sorted(points[-1] for points in lines(way)) == [(5, 0.45), (5, 0.5), (5, 0.55), (5, 0.6)]
    assert texts(way) == ["a", "d"]
    assert lines(entropy) == [[(0, 1.0), (5, 0.5)], [(0, 1.0), (5, 0.25)]]


@pytest.mark.parametrize("plan", [ROLLOUT, sedona([point(0), point(5)])], ids=["rollout", "sedona"])
def test_files(plan, tmp_path):
    path = plan_picture(plan, tmp_path / "folder" / "plan.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 600
    assert height > 400
    assert [file.name for file in path.parent.iterdir()] == ["plan.png"]


def test_plans_without_a_history(tmp_path):
    for found in ({"search": "uniform"}, {"search": "rollout", "transfer": {}}, {}):
        with pytest.raises(PlanError, match=r"comes from search=.* and holds no trajectory to draw"):
            plan_picture(Plan(provenance=found), tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())
