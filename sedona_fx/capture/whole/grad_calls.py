"""Calls of ``torch.autograd.grad`` in a graph, and the stretch of the graph that each of them differentiates.

Such a call walks back from its outputs to its inputs along the graph that autograd has built meanwhile. A boundary in
between would cut that graph, so all of it stays in one block.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import networkx as nx
import torch
from torch import fx

from sedona_fx.ir.graph import info

_SIGNATURE = inspect.signature(torch.autograd.grad)


def grad_calls(graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of ``torch.autograd.grad``, in the order of the graph."""
    return [node for node in graph.nodes if node.target is torch.autograd.grad]


def argument(call: fx.Node, name: str) -> Any:
    """Return an argument of a call of ``torch.autograd.grad`` by its name, or its default."""
    bound = _SIGNATURE.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return bound.arguments[name]


def nodes_of(call: fx.Node, name: str) -> list[fx.Node]:
    """Return the nodes in an argument of a call of ``torch.autograd.grad``, each once."""
    found: dict[fx.Node, None] = {}
    fx.map_arg(argument(call, name), lambda node: found.setdefault(node, None))
    return list(found)


def stretch(call: fx.Node, needs: nx.DiGraph) -> set[fx.Node]:
    """Return the nodes that must be in one block with a call of ``torch.autograd.grad``, the call included.

    These are the nodes on the way from its inputs to its outputs, both included. Inputs of the graph and tensors of the
    model are not among them: every block reads these itself.

    Args:
        call: the call.
        needs: what must run before what in the graph.
    """
    inputs, outputs = nodes_of(call, "inputs"), nodes_of(call, "outputs")
    names = {str(node.target) for node in inputs if node.op == "get_attr"}
    names = names.union(*(info(node).parameters for node in inputs if node.op == "get_attr"))
    sources = {*inputs, *(node for node in needs if names and _reads(node, names))}
    after = sources.union(*(nx.descendants(needs, source) for source in sources))
    before = set(outputs).union(*(nx.ancestors(needs, output) for output in outputs))
    return {node for node in (after & before) | {call, *inputs} if node.op not in ("placeholder", "get_attr")}


def _reads(node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node reads one of the parameters of these names."""
    inside = f"{node.target}." if node.op == "call_module" else None
    return bool(set(names).intersection(info(node).parameters)) or (
        inside is not None and any(n.startswith(inside) for n in names)
    )


def derivatives(graph: fx.Graph) -> str:
    """Return why calls of ``torch.autograd.grad`` leave fewer places to cut at, with the user's lines; ``""`` without.

    Args:
        graph: any phase.
    """
    calls = [info(call) for call in grad_calls(graph)]
    if not calls:
        return ""
    places = dict.fromkeys((repr(r.path) if r.path else "the model's own forward") + r.line for r in calls)
    return (
        f" What torch.autograd.grad differentiates in {' and in '.join(places)} stays in one block, since a cut would "
        "end its graph: take fewer blocks, or name cuts=[...] before or behind that stretch. blocks=1 trains it whole."
    )
