"""PRUNED: the chosen split points stay, each with its one head; the others are gone as if they had never been."""

import chain
import torch

from sedona_fx.ir.graph import SPLIT_POINTS, split_point_nodes
from sedona_fx.passes import prune, relax


def test_rounding_the_relaxation():
    gm = chain.relaxed(chain.graphs().train)
    pruned = prune(gm, {"a": 1, "c": 0})
    points = [pruned.get_submodule(str(n.target)) for n in split_point_nodes(pruned.graph)]
    assert [str(n.target) for n in split_point_nodes(pruned.graph)] == [f"{SPLIT_POINTS}.0", f"{SPLIT_POINTS}.1"]
    assert points[0].heads == [gm.get_submodule(f"{SPLIT_POINTS}.0").heads[1]]
    assert points[1].heads == [gm.get_submodule(f"{SPLIT_POINTS}.2").heads[0]]
    for point in points:
        assert torch.softmax(point.alpha, 0).tolist() == [1.0, 0.0]
    x, _ = chain.batch()
    *local, output = pruned(x)
    assert len(local) == 2
    assert torch.equal(output, chain.model()(x))


def test_gradients_do_not_pass_a_split_point_and_pass_where_there_is_none():
    pruned = prune(chain.relaxed(chain.graphs().train), {"b": 0})
    x, y = chain.batch()
    chain.cross_entropies(pruned(x), y)[-1].backward()
    assert torch.count_nonzero(pruned.get_submodule("a").weight.grad) == 0
    assert torch.count_nonzero(pruned.get_submodule("c").weight.grad) > 0


def test_no_split_point_leaves_the_graph_as_it_was():
    gm = chain.graphs().train
    pruned = prune(chain.relaxed(gm), {})
    assert [n.format_node() for n in pruned.graph.nodes][:-1] == [n.format_node() for n in gm.graph.nodes][:-1]
    assert not hasattr(pruned, SPLIT_POINTS)


def test_its_input_is_left_alone():
    gm = chain.relaxed(chain.graphs().train)
    before = chain.text(gm)
    prune(gm, {"b": 1})
    assert chain.text(gm) == before


def test_without_heads():
    pruned = prune(relax(chain.graphs().train, {"a": [], "b": []}), {"b": 0})
    assert len(split_point_nodes(pruned.graph)) == 1
    assert len(pruned(chain.batch()[0])) == 1
