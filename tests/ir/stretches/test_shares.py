"""The least largest share, against all choices of cuts there are."""

import itertools

import pytest
from graphs import analysed
from hypothesis import given, settings
from hypothesis import strategies as st
from skips import UNet, images
from torch import nn

from sedona_fx.ir.flow import predecessors
from sedona_fx.ir.graph import info
from sedona_fx.ir.stretches.shares import Shares, node_work, work_before
from sedona_fx.passes.cuts import aliases, possible


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 8))
def test_no_choice_of_cuts_has_a_smaller_largest_block(stretches, blocks):
    sums = list(itertools.accumulate(stretches))
    shares = Shares(tuple(sums[:-1]), sums[-1])
    if blocks > len(stretches):
        assert shares.least_largest(blocks) == float("inf")
        return
    sizes = []
    for chosen in itertools.combinations(sums[:-1], blocks - 1):
        edges = [0, *chosen, sums[-1]]
        sizes.append(max(after - before for before, after in itertools.pairwise(edges)))
    assert shares.least_largest(blocks) == (min(sizes) / sums[-1] if sums[-1] else 1.0)
    assert shares.largest() == max(stretches) / max(1, sums[-1])


def test_work_before_a_place_is_that_of_all_it_needs():
    graph = analysed(UNet(), images()[0]).train.graph
    places = {name: node for node in possible(graph).values() for name in aliases(info(node))}
    needs = predecessors(graph)
    work = node_work(graph, "flops")
    assert sum(work.values()) == sum(info(node).flops for node in graph.nodes)
    ends = [places[name] for name in ("down.0", "down.2.0", "down.3", "up.1.0", "up.2")]
    # By hand: two FLOPs a multiply-add, two images of 32 x 32, widths 8, 16, 32, 64.
    at = [2 * 2 * (32 // 2**k) ** 2 for k in range(4)]  # of one weight at each level
    down = [at[0] * 9 * (3 * 8 + 64), at[1] * 9 * (8 * 16 + 256), at[2] * 9 * (16 * 32 + 1024), at[3] * 9 * 6144]
    up = [at[k] * (2 * o * o * 4 // 4 + 9 * 3 * o * o) for k, o in ((2, 32), (1, 16), (0, 8))]
    half = at[2] * 9 * 16 * 32
    middle = at[1] * (2 * 16 * 16 + 9 * 32 * 16)
    expected = [down[0], down[0] + down[1] + half, sum(down), sum(down) + up[0] + middle, sum(down) + sum(up)]
    assert work_before(ends, needs, work) == expected


@pytest.mark.parametrize("measure", ["flops", "activation_bytes"])
def test_what_counts_nothing_is_counted_otherwise(measure):
    model = nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4))
    graph = analysed(model, images()[0][:, 0, :, :4]).train.graph
    work = node_work(graph, measure)  # norms have no FLOPs, but keep bytes
    assert sum(work.values()) == sum(node_work(graph, "activation_bytes").values()) > 0
