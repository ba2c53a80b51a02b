"""Fields of the output that heads are given: targets that a part of the forward computes without a gradient.

A momentum encoder gives the loss what the net is to predict, and it does so from the inputs alone. Such a field is
computed in the first block, and every local loss gets it in its place, as the loss of the whole model does.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from sedona_fx.ir.flow import ancestors, dependency_graph
from sedona_fx.ir.graph import info, output_node
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.outputs import Step, fields


def mark_given_fields(train: fx.GraphModule, evaluation: fx.GraphModule, form: OutputFormat) -> tuple[Step, ...]:
    """Mark, in both graphs, the values that heads are given, and return their keys in the output.

    They hold no gradient, are computed of parameters, and need no value that gradients flow through.

    Args:
        train: annotated; only records change.
        evaluation: the eval graph, or `train` itself.
        form: of the output.
    """
    if form.bare:
        return ()
    found = [_candidates(gm, form.first) for gm in dict.fromkeys((train, evaluation))]
    keys = tuple(key for key in found[0] if all(key in other for other in found))
    for nodes in found:
        for key in keys:
            info(nodes[key]).given = (*info(nodes[key]).given, key)
    return keys


def _candidates(gm: fx.GraphModule, primary: Step) -> dict[Step, fx.Node]:
    """Return key -> node of the fields of a graph's output that qualify."""
    returned: Any = output_node(gm.graph).args[0]
    nodes = {key: value for key, value in _fields(returned).items() if isinstance(value, fx.Node) and key != primary}
    needs = dependency_graph(gm.graph) if nodes else None
    found = {}
    for key, node in nodes.items():
        record = info(node)
        if needs is None or record.is_live or not record.is_tensor or node.op in ("placeholder", "get_attr"):
            continue
        before = ancestors(node, needs)
        # An update of the encoder's own weights, under no_grad, overwrites what depends on parameters.
        live = any(info(n).is_live and n.op != "get_attr" and not info(n).mutates for n in before)
        if not live and any(info(n).parameters for n in before):
            found[key] = node
    return found


def _fields(returned: Any) -> dict[Any, Any]:
    """Return the fields of what a graph returns, where a call builds a container of the user's own type as well."""
    if isinstance(returned, fx.Node):
        content: Any = returned.args[0] if returned.args else returned.kwargs
        if returned.op != "call_function" or not isinstance(returned.target, type):
            return {}
        return dict(enumerate(content) if issubclass(returned.target, list) else content)
    return dict(fields(returned))
