"""The picture of the guided search: map, dots and rollouts show what the plan's provenance says, and are to be read."""

import itertools
import math
import struct

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from sedona_fx import Plan
from sedona_fx.errors import PlanError
from sedona_fx.report import plan_picture
from sedona_fx.report.scores import draw_scores

PLACES = ["a", "b", "c"]
CANDIDATES = {"a": ["linear", "mlp"], "b": ["mlp"], "c": ["linear", "mlp"]}
SCORES = [[0.1, -0.2], [0.05], [0.0, 0.15]]
BEST, SECOND, THIRD = [["a", "linear"], ["c", "mlp"]], [["b", "mlp"], ["c", "mlp"]], [["a", "linear"], ["b", "mlp"]]
ROUNDS = [
    {"step": 2, "scores": [[SECOND, 1.5], [BEST, 1.75]]},
    {"step": 8, "scores": [[SECOND, 1.25]]},
]


def guided(rounds=(), **changes):
    found = {
        "search": "guided",
        "places": PLACES,
        "candidates": CANDIDATES,
        "scores": SCORES,
        "plans": [[BEST, 0.75], [SECOND, 0.7], [THIRD, 0.65]],
        "rounds": list(rounds),
    }
    return Plan(cuts=("b", "c"), heads=("mlp", "mlp"), model="Net", provenance=found | changes)


def large(places, heads, count):
    """Return a plan of `count` ranked ones that cut behind two of many places; the last one was chosen."""
    names = [f"layer{k // 6 + 1}.{k % 6}" for k in range(places)]
    kinds = [f"sedona-{k + 1}" for k in range(heads)]
    scores = [[math.sin(k) / (10 * m + 10) for m in range(heads)] for k in range(places)]
    pairs = [(k, other) for k in range(places) for other in range(k + 1, places)][:count]
    plans = [[[[names[k], kinds[0]], [names[j], kinds[-1]]], 0.9 - 0.01 * n] for n, (k, j) in enumerate(pairs)]
    chosen = plans[-1][0]
    rounds = [{"step": 4, "scores": [[chosen, 1.0], [plans[0][0], 1.5]]}, {"step": 9, "scores": [[chosen, 0.5]]}]
    plan = guided(rounds, places=names, candidates=dict.fromkeys(names, kinds), scores=scores, plans=plans)
    return Plan(cuts=tuple(p for p, _ in chosen), heads=tuple(h for _, h in chosen), provenance=plan.provenance)


def panels(figure):
    """Return the map, the dots and, where there are any, the rollouts."""
    titled = {axis.get_title(loc="left"): axis for axis in figure.axes}
    return [titled[name] for name in ("framed: chosen", "the best plans", "rollouts of the best") if name in titled]


def dots(axis):
    """Return the drawn points by their label in the legend."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axis.get_lines()
    }


def labels(ticks):
    return [label.get_text() for label in ticks]


def test_the_map_holds_the_scores_and_frames_the_chosen_pairs():
    axis = panels(draw_scores(guided()))[0]
    (image,) = axis.get_images()
    drawn = [[None if masked else value for value, masked in zip(*row, strict=True)]
             for row in zip(image.get_array().data.tolist(), image.get_array().mask.tolist(), strict=True)]  # fmt: skip
    assert drawn == [[0.1, -0.2], [None, 0.05], [0.0, 0.15]]
    assert labels(axis.get_yticklabels()) == ["a", "b", "c"]
    assert labels(axis.get_xticklabels()) == ["linear", "mlp"]
    assert axis.get_ylim() == (2.5, -0.5)  # the input above
    assert (image.norm.vmin, image.norm.vmax) == (-0.2, 0.2)  # nothing added: the colour in the middle
    assert image.colorbar.ax.get_ylabel() == "adds to the cosine with\nbackpropagation's gradient"  # an older plan
    assert [patch.get_xy() for patch in axis.patches] == [(0.5, 0.5), (0.5, 1.5)]  # around (b, mlp) and (c, mlp)
    assert labels(axis.texts) == ["+0.100", "-0.200", "+0.050", "+0.000", "+0.150"]


@pytest.mark.parametrize(("score", "says"), [("cut", "cosine"), ("plan", "adds to the cosine")])
def test_the_colour_bar_says_what_the_numbers_are(score, says):
    (image,) = panels(draw_scores(guided(score=score)))[0].get_images()
    assert image.colorbar.ax.get_ylabel() == f"{says} with\nbackpropagation's gradient"


def test_colours_are_told_apart_by_lightness_and_by_blue_against_yellow():
    (image,) = panels(draw_scores(guided()))[0].get_images()
    low, middle, high = (image.cmap(x) for x in (0.0, 0.5, 1.0))
    assert min(middle[:3]) > 0.9
    assert low[2] < low[0]
    assert high[2] > high[0]
    assert all(sum(end[:3]) < 2 for end in (low, high))


def test_dots_in_the_order_of_the_plans_with_their_cuts_in_words():
    axis = panels(draw_scores(guided()))[1]
    assert dots(axis) == {"chosen": [(0.7, 1.5)], "others": [(0.75, 0.5), (0.65, 2.5)]}
    words = ["1. a (linear), c (mlp)", "2. b (mlp), c (mlp)", "3. a (linear), b (mlp)"]
    assert [label.replace("\N{NO-BREAK SPACE}", " ") for label in labels(axis.get_yticklabels())] == words
    assert list(axis.get_yticks()) == [0.5, 1.5, 2.5]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the best one above
    weights = [label.get_fontweight() for label in axis.get_yticklabels()]
    assert weights == ["normal", "bold", "normal"]
    (chosen,) = [line for line in axis.get_lines() if line.get_label() == "chosen"]
    assert chosen.get_markersize() == max(line.get_markersize() for line in axis.get_lines())
    assert to_rgba(chosen.get_color()) not in {
        to_rgba(line.get_color()) for line in axis.get_lines() if line is not chosen
    }


def test_rollouts_below_and_their_plans_marked():
    _, axis, rollouts = panels(draw_scores(guided(ROUNDS)))
    assert dots(axis) == {"chosen": [(0.7, 1.5)], "rolled out": [(0.75, 0.5)], "others": [(0.65, 2.5)]}
    drawn = [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in rollouts.get_lines()]
    assert [(2, 1.5), (8, 1.25)] in drawn
    assert [(2, 1.75)] in drawn
    assert len(panels(draw_scores(guided()))) == 2


def test_a_single_head_needs_no_words():
    plan = guided(
        candidates={place: ["mlp"] for place in PLACES},
        scores=[[0.0]] * 3,  # all alike: no range to colour
        plans=[[[["b", "mlp"], ["c", "mlp"]], 0.5], [[["a", "mlp"], ["c", "mlp"]], 0.5]],
    )
    assert labels(panels(draw_scores(plan))[1].get_yticklabels()) == ["1. b, c", "2. a, c"]


def test_twenty_plans_and_the_chosen_one():
    axis = panels(draw_scores(large(50, 4, 25)))[1]
    shown = labels(axis.get_yticklabels())
    assert [int(label.partition(".")[0]) for label in shown] == [*range(1, 21), 25]
    assert [round(x, 6) for x, _ in dots(axis)["chosen"]] == [0.66]


def test_a_plan_whose_cuts_were_changed_afterwards():
    other = guided()
    figure = draw_scores(Plan(cuts=("x", "b"), heads=("mlp", None), provenance=other.provenance))
    frames, axis = panels(figure)
    assert not frames.patches
    assert list(dots(axis)) == ["others"]


@pytest.mark.parametrize(("places", "heads", "count"), [(50, 4, 40), (2, 2, 1)], ids=["50x4", "2x2"])
def test_nothing_lies_outside_or_on_top_of_each_other(places, heads, count):
    figure = draw_scores(large(places, heads, count))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    drawn = canvas.get_renderer()
    boxes = [axis.get_tightbbox(drawn) for axis in panels(figure)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for k, one in enumerate(boxes):
        for other in boxes[:k]:
            assert min(one.x1, other.x1) <= max(one.x0, other.x0) or min(one.y1, other.y1) <= max(one.y0, other.y0)
    rows = [label.get_window_extent(drawn) for label in panels(figure)[1].get_yticklabels()]
    for above, below in itertools.pairwise(rows):
        assert below.y1 <= above.y0 + 1
    for axis in panels(figure)[:2]:
        assert axis.get_window_extent(drawn).width > 80


def test_the_file(tmp_path):
    data = plan_picture(guided(ROUNDS), tmp_path / "plan.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 600
    assert height > 300


def test_a_guided_search_without_cuts_has_nothing_to_draw(tmp_path):
    with pytest.raises(PlanError, match="search='guided' and holds no trajectory to draw"):
        plan_picture(Plan(provenance={"search": "guided"}), tmp_path / "plan.png")
