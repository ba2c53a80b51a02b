"""RELAXED -> PRUNED: keep the split points that were chosen, each with one head, and remove all others.

This ends a search: what it has learned as shares between 0 and 1 is rounded to a decision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from sedona_fx.ir.graph import SPLIT_POINTS, copy_graph, info, output_node, split_point_nodes
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.split_point import SplitPoint, gated_value
from sedona_fx.passes.relax import LOCAL_OUTPUT


@graph_pass(Phase.PRUNED)
def prune(gm: fx.GraphModule, chosen: Mapping[str, int]) -> fx.GraphModule:
    """Round the relaxation: ``p_through`` to 1 where there is no cut, to 0 where there is one.

    Before: RELAXED. After: PRUNED; the split points of `chosen` are left, renumbered, each with its one head (with the
    head's own weights, not an average), the others are gone.

    Args:
        gm: it is not changed. Modules are shared.
        chosen: cut name -> index of the head that stays (ignored where there are no heads).
    """
    graph, _ = copy_graph(gm.graph)
    pruned = Program(gm, graph, class_name=type(gm).__name__)
    kept: list[tuple[fx.Node, SplitPoint]] = []
    for split in split_point_nodes(graph):
        cut = str(info(split.all_input_nodes[0]).cut)
        if cut not in chosen:
            _remove(split)
            continue
        relaxed_point = gm.get_submodule(str(split.target))
        assert isinstance(relaxed_point, SplitPoint)
        point = SplitPoint(relaxed_point.heads[chosen[cut] : chosen[cut] + 1])
        with torch.no_grad():
            point.alpha.copy_(torch.tensor([1e4, -1e4]))  # softmax gives exactly isolate = 1, through = 0
        kept.append((split, point))
    if hasattr(pruned, SPLIT_POINTS):
        delattr(pruned, SPLIT_POINTS)
    for index, (split, point) in enumerate(kept):
        split.target = f"{SPLIT_POINTS}.{index}"
        pruned.add_submodule(split.target, point)
    pruned.recompile()
    return pruned


def _remove(split: fx.Node) -> None:
    """Remove a split point: later readers read the values before it, its local output leaves the graph's outputs."""
    graph = split.graph
    result = output_node(graph)
    for item in list(split.users):
        if item.args[1] != LOCAL_OUTPUT:
            bypass(split, item)
            continue
        outputs = result.args[0]
        assert isinstance(outputs, tuple)
        result.args = (tuple(value for value in outputs if value is not item),)
        graph.erase_node(item)
    graph.erase_node(split)


def bypass(split: fx.Node, item: fx.Node) -> None:
    """Let the readers of one result of a split point read the value before the split point, and erase the result."""
    value = gated_value(split, item)
    for carried in (*boundary_clones(item), item):
        carried.replace_all_uses_with(value)
        split.graph.erase_node(carried)


def boundary_clones(node: fx.Node) -> list[fx.Node]:
    """Return the clones of a value that passes have added at a boundary."""
    return [user for user in node.users if user.target is torch.clone and info(user).boundary]
