"""Site names: names of nodes that are the same in the train graph and in the eval graph of a model.

A site is made of module path, operation and occurrence (``layer1.0:add#2``). Cuts and the values that cross between
blocks are named by site, so that one plan fits both graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from difflib import SequenceMatcher

import torch
from torch import fx

from sedona_fx.ir.graph import info, operation
from sedona_fx.ir.program import attribute


def name_sites(graph: fx.Graph, taken: Collection[str] = ()) -> None:
    """Give a site to every node that has none yet, and its position in the program to every node.

    Several calls of one module are told apart in ``returned_by`` as well: ``"block"``, ``"block#2"``.

    Args:
        graph: only the records of its nodes change.
        taken: sites that may not be given.
    """
    occurrences: Counter[str] = Counter()
    returns: Counter[str] = Counter()
    used = {info(node).site for node in graph.nodes} | set(taken)
    for order, node in enumerate(graph.nodes):
        record, base = info(node), _base_name(node)
        record.order = order
        while not record.site:
            occurrences[base] += 1
            site = base if occurrences[base] == 1 else f"{base}#{occurrences[base]}"
            record.site = site if site not in used else ""
        used.add(record.site)
        paths = [path for path in record.returned_by if not (node.op == "call_module" and path == node.target)]
        returns.update(paths)
        record.returned_by = tuple(path if returns[path] == 1 else f"{path}#{returns[path]}" for path in paths)


def match_sites(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Give each node of the eval graph the site of the same node in the train graph, or a new one if there is none.

    Counting occurrences in each graph would not do: an ``add`` that only the train graph has would shift the names of
    all later ones. So the two graphs are aligned like two texts.
    """
    train_nodes, eval_nodes = list(train.nodes), list(evaluation.nodes)
    _align(train_nodes, eval_nodes, lambda n: f"{_base_name(n)} {[a for a in n.args if not isinstance(a, fx.Node)]}")
    name_sites(evaluation, taken=[info(node).site for node in train_nodes])


def _base_name(node: fx.Node) -> str:
    """Return the site of a node without the occurrence."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    return f"{info(node).path}:{operation(node)}"


def _align(train: list[fx.Node], evaluation: list[fx.Node], key: Callable[[fx.Node], str]) -> None:
    """Match nodes of equal keys in order; in the stretches between them, nodes of equal base names."""
    matcher = SequenceMatcher(None, [key(n) for n in train], [key(n) for n in evaluation], autojunk=False)
    for tag, train_start, train_end, eval_start, eval_end in matcher.get_opcodes():
        train_part, eval_part = train[train_start:train_end], evaluation[eval_start:eval_end]
        if tag == "equal":
            for train_node, eval_node in zip(train_part, eval_part, strict=True):
                info(eval_node).site = info(train_node).site
        elif tag == "replace" and key is not _base_name:
            _align(train_part, eval_part, _base_name)


def same_graphs(train: fx.GraphModule, evaluation: fx.GraphModule) -> bool:
    """Whether two graphs do the same: the same operations at the same sites, on the same constants of the forward."""
    if _operations(train) != _operations(evaluation):
        return False
    for node in train.graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target):
            first, second = attribute(train, str(node.target)), attribute(evaluation, str(node.target))
            if first is not second and not (isinstance(first, torch.Tensor) and torch.equal(first, second)):
                return False
    return True


def _operations(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Return the site and the text of every node, arguments given by site."""

    def site(node: fx.Node) -> str:
        return info(node).site

    return [
        (
            site(node),
            repr((node.op, node.target, fx.map_arg(node.args, site), fx.map_arg(node.kwargs, site), info(node).region)),
        )
        for node in gm.graph.nodes
    ]
