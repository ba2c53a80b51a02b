"""LOWERED -> TRACED: the graph that was traced, again: no heads, no boundaries, the order of the program.

It is run where no blocks are needed: by ``net(x)``, whose gradients are then the model's own, in deployment, and for
ONNX.
"""

from __future__ import annotations

import torch
from torch import fx

from sedona_fx.capture.whole.derivatives import with_gradient
from sedona_fx.ir.graph import copy_graph, info, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.program import Program
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def strip(gm: fx.GraphModule, *, keep_moves: bool = False) -> fx.GraphModule:
    """Remove everything that :func:`~sedona_fx.passes.lower.lower` inserted.

    Before: LOWERED. After: TRACED; node for node the graph that was traced.

    Args:
        gm: it is not changed. Modules are shared.
        keep_moves: keep moves between devices, and clones; gradients flow through them. Otherwise they are removed as
            well: bring the modules to one device first.
    """
    graph, _ = copy_graph(gm.graph)
    result = output_node(graph)
    outputs = result.args[0]
    assert isinstance(outputs, tuple)
    result.args = (outputs[-1],)
    carriers = (torch.detach, with_gradient, *(() if keep_moves else (torch.clone, "to")))
    for node in list(graph.nodes):
        if info(node).boundary and node.target in carriers:
            node.replace_all_uses_with(node.all_input_nodes[0])
    for node in reversed(list(graph.nodes)):
        if info(node).boundary and not node.users and node.op != "output":
            graph.erase_node(node)
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    for node in body if keep_moves else sorted(body, key=lambda n: info(n).order):
        result.prepend(node)
    return Program(gm, graph, class_name=type(gm).__name__)
