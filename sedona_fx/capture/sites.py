"""Names of nodes that are the same in the train graph and in the eval graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from difflib import SequenceMatcher

import torch
from torch import fx

from sedona_fx.ir.graph import info, operation


def _base_name(node: fx.Node) -> str:
    """Name a node by module path and operation, without the occurrence."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    return f"{info(node).path}:{operation(node)}"


def name_sites(graph: fx.Graph, taken: Collection[str] = ()) -> None:
    """Name every node that has no site yet by module path, operation and occurrence."""
    seen: Counter[str] = Counter()
    returned: Counter[str] = Counter()
    used = {info(node).site for node in graph.nodes} | set(taken)
    for order, node in enumerate(graph.nodes):
        record, base = info(node), _base_name(node)
        record.order = order
        while not record.site:
            seen[base] += 1
            site = base if seen[base] == 1 else f"{base}#{seen[base]}"
            record.site = site if site not in used else ""
        used.add(record.site)
        paths = [path for path in record.returned_by if not (node.op == "call_module" and path == node.target)]
        returned.update(paths)
        record.returned_by = tuple(path if returned[path] == 1 else f"{path}#{returned[path]}" for path in paths)


def match_sites(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Give nodes of the eval graph the sites of the train nodes that they are; names of their own to the others.

    Counting occurrences would not do: an ``add`` that stands only in the train graph would shift the names of all later
    ones. The two graphs are aligned as texts are.
    """
    first, second = list(train.nodes), list(evaluation.nodes)
    _align(first, second, lambda n: f"{_base_name(n)} {[a for a in n.args if not isinstance(a, fx.Node)]}")
    name_sites(evaluation, taken=[info(node).site for node in first])


def _align(train: list[fx.Node], evaluation: list[fx.Node], key: Callable[[fx.Node], str]) -> None:
    """Match nodes with the same key in the same order; between them, nodes that have at least the same name."""
    matcher = SequenceMatcher(None, [key(n) for n in train], [key(n) for n in evaluation], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            for one, other in zip(train[a:b], evaluation[c:d], strict=True):
                info(other).site = info(one).site
        elif tag == "replace" and key is not _base_name:
            _align(train[a:b], evaluation[c:d], _base_name)


def same_graphs(train: fx.GraphModule, evaluation: fx.GraphModule) -> bool:
    """Whether two graphs do the same, constants that the forward made included."""

    def facts(gm: fx.GraphModule) -> list[tuple[str, str]]:
        def site(node: fx.Node) -> str:
            return info(node).site

        return [
            (site(n), repr((n.op, n.target, fx.map_arg(n.args, site), fx.map_arg(n.kwargs, site))))
            for n in gm.graph.nodes
        ]

    if facts(train) != facts(evaluation):
        return False
    for node in train.graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target):
            a, b = getattr(train, str(node.target)), getattr(evaluation, str(node.target))
            if a is not b and not (isinstance(a, torch.Tensor) and torch.equal(a, b)):
                return False
    return True
