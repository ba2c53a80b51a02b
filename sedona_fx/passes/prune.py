"""RELAXED -> PRUNED: keep the chosen split points, each with one head; round every other one to an ordinary edge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from sedona_fx.ir.graph import SPLIT_POINTS, copy_graph, info, output_node, split_point_nodes
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint, gated_value


@graph_pass(Phase.PRUNED)
def prune(gm: fx.GraphModule, chosen: Mapping[str, int]) -> fx.GraphModule:
    """Round the relaxation: ``p_through`` to 1 where there is no cut, to 0 where there is one.

    Before: RELAXED. After: PRUNED; the split points of `chosen` stand, renumbered, each with its one head (fresh from
    its own weights, not averaged), the others are gone.

    Args:
        gm: the RELAXED graph; it is not changed. Modules are shared.
        chosen: cut name -> index of the head that stays (ignored where there are no heads).
    """
    graph, _ = copy_graph(gm.graph)
    pruned = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    kept: list[fx.Node] = []
    points: list[SplitPoint] = []
    for split in split_point_nodes(graph):
        cut = str(info(split.all_input_nodes[0]).cut)
        if cut not in chosen:
            _remove(graph, split)
            continue
        old = gm.get_submodule(str(split.target))
        assert isinstance(old, SplitPoint)
        point = SplitPoint(old.heads[chosen[cut] : chosen[cut] + 1])
        with torch.no_grad():
            point.alpha.copy_(torch.tensor([1e4, -1e4]))  # softmax gives exactly isolate = 1, through = 0
        kept.append(split)
        points.append(point)
    if hasattr(pruned, SPLIT_POINTS):
        delattr(pruned, SPLIT_POINTS)
    for index, (split, point) in enumerate(zip(kept, points, strict=True)):
        split.target = f"{SPLIT_POINTS}.{index}"
        pruned.add_submodule(split.target, point)
    pruned.recompile()
    return pruned


def _remove(graph: fx.Graph, split: fx.Node) -> None:
    """Take a split point out: readers of the way forward read the values again, its local output is dropped."""
    result = output_node(graph)
    for item in list(split.users):
        if item.args[1] == 1:
            outputs = result.args[0]
            assert isinstance(outputs, tuple)
            result.args = (tuple(value for value in outputs if value is not item),)
            graph.erase_node(item)
            continue
        source = gated_value(split, item)
        for clone in [user for user in item.users if info(user).boundary and user.target is torch.clone]:
            clone.replace_all_uses_with(source)
            graph.erase_node(clone)
        item.replace_all_uses_with(source)
        graph.erase_node(item)
    graph.erase_node(split)
