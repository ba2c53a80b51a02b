"""TRACED, annotated -> TRACED: modules that differentiate by what they read get tensors that allow it.

A module that is kept whole may call ``torch.autograd.grad`` with a tensor that it was given. In the model that tensor
requires a gradient, since weights have made it; in a block it may have come in detached, and an evaluation may run
without gradients. (Calls that are nodes of the graph themselves are prepared where they are recorded,
:mod:`sedona_fx.capture.whole.derivatives`.)
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sedona_fx.capture.whole.derivatives import with_gradient
from sedona_fx.ir.graph import copy_info, info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.region import Region
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def derivative_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """Let modules that take derivatives by autograd read tensors that require a gradient, whatever block they are in.

    Before: TRACED, annotated. After: the same, computing the same numbers; between such a module and each live tensor
    that it reads stands a node, and the module runs with gradients on.

    Args:
        gm: changed in place.
    """
    modules = [node for node in gm.graph.nodes if info(node).derives == "autograd"]
    for node in modules:
        record = info(node)
        region = record.region if record.region is not None else Region()
        record.region = replace(region, grad=True) if region.grad is None else region
        for number, source in enumerate(node.all_input_nodes):
            if info(source).is_live and info(source).is_tensor:
                with gm.graph.inserting_before(node):
                    leaf = gm.graph.call_function(with_gradient, (source,))
                site = f"{record.site}@with_gradient{number}"
                changes = {"path": record.path, "order": record.order, "region": record.region, "returned_by": ()}
                unused = {"parameters": (), "trained": (), "weighty": False, "flops": 0, "saved": {}, "derives": ""}
                copy_info(source, leaf, site=site, mutates=frozenset(), **changes, **unused)
                node.replace_input_with(source, leaf)
    if modules:
        gm.recompile()
    return gm
