"""LOWERED -> the original graph again, for deployment and ONNX: no heads, no boundaries, the order of the program."""

from __future__ import annotations

import torch
from torch import fx

from sedona_fx.ir.graph import HEADS, copy_graph, info, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def strip(gm: fx.GraphModule, *, keep_moves: bool = False) -> fx.GraphModule:
    """Take out everything that :func:`~sedona_fx.passes.lower.lower` put in.

    Before: LOWERED. After: TRACED; node for node the graph that was traced. Device moves go as well: bring the modules
    to one device first. With `keep_moves` they stay, and gradients flow through them.
    """
    graph, _ = copy_graph(gm.graph)
    result = output_node(graph)
    outputs = result.args[0]
    assert isinstance(outputs, tuple)
    result.args = (outputs[-1],)
    for node in list(graph.nodes):
        if not info(node).boundary:
            continue
        if keep_moves and node.target in (torch.clone, "to"):
            continue
        if not str(node.target).startswith(HEADS + ".") and node.target in (torch.detach, torch.clone, "to"):
            node.replace_all_uses_with(node.all_input_nodes[0])
    for node in reversed(list(graph.nodes)):
        if info(node).boundary and not node.users and node.op != "output":
            graph.erase_node(node)
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    for node in body if keep_moves else sorted(body, key=lambda n: info(n).order):
        result.prepend(node)
    stripped = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    return stripped
