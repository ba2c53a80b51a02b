"""Where networkx answers a question of the compiler, and where it must not: both ways of each, with equal results.

python benchmarks/graph_library.py --threads 1 --json benchmarks/results/graph_library.json

Ancestors are networkx's in the package; the plain way is here to compare. The longest chain of compatible cuts, which
is asked for at every number of crossing activations, is the package's own, and networkx's longest path is here.
The best plans for additive scores are the package's own program; as paths through a layered graph (a layer for each
cut, edges weighed by the score of the head) they are networkx's shortest paths.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torchvision.models as zoo
from captured import captured
from common import options, report
from torch import fx, nn

from sedona_fx.ir.flow import ancestors, dependency_graph, longest_chain
from sedona_fx.ir.graph import cut_points, output_node
from sedona_fx.measure import step_seconds
from sedona_fx.passes.cuts import possible
from sedona_fx.search.problem.dynamic_program import best_plans

HEADS = 4


def analysed(model: nn.Module, x: torch.Tensor) -> fx.Graph:
    """Return the ANALYSED train graph of a model."""
    batch = x, torch.zeros(len(x), dtype=torch.long)
    return captured(model, batch, needs_data=False, blocks=2).train.graph


def plain_ancestors(root: fx.Node, needs: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    """Return what a node needs, by a stack."""
    seen, stack = set[fx.Node](), [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(needs[node])
    return seen


def networkx_chain(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """Return the longest chain as a longest path: an edge to a candidate weighs 1, any other edge 0."""
    wanted, needs, start = set(nodes), dependency_graph(graph), object()
    needs.add_edges_from([(start, node) for node in graph.nodes if not needs.pred[node]])
    nx.set_edge_attributes(needs, {edge: int(edge[1] in wanted) for edge in needs.edges}, "weight")
    path = nx.dag_longest_path(needs, weight="weight", topo_order=[start, *graph.nodes])
    return [node for node in path if node in wanted]


def layered(scores: list[list[float]], blocks: int) -> nx.DiGraph:
    """Return the plans as paths from "start" to "end": nodes are (cut, place, head)."""
    edges = nx.DiGraph()
    places = range(len(scores))
    for place, head in itertools.product(places, range(HEADS)):
        edges.add_edge("start", (0, place, head), weight=scores[place][head])
        edges.add_edge((blocks - 2, place, head), "end", weight=0.0)
    for cut, (a, b) in itertools.product(range(blocks - 2), itertools.combinations(places, 2)):
        for head, after in itertools.product(range(HEADS), repeat=2):
            edges.add_edge((cut, a, head), (cut + 1, b, after), weight=scores[b][after])
    return edges


def shortest_plans(scores: list[list[float]], blocks: int, count: int) -> list[float]:
    """Return the scores of the best plans as networkx finds them."""
    edges = layered(scores, blocks)
    paths = nx.shortest_simple_paths(edges, "start", "end", weight="weight")
    return [nx.path_weight(edges, path, "weight") for path in itertools.islice(paths, count)]


def row(question: str, size: str, ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Time both ways of one question, interleaved."""
    seconds = step_seconds(ways, repeats=repeats)
    ratio = seconds["networkx"] / seconds["plain"]
    return {
        "question": question,
        "size": size,
        **{f"{name}, ms": 1000 * s for name, s in seconds.items()},
        "networkx / plain": ratio,
    }


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__, repeats=5)
    torch.manual_seed(0)
    rows = []
    image = torch.randn(2, 3, 224, 224)
    deep = nn.Sequential(*(layer for _ in range(2000) for layer in (nn.Linear(4, 4), nn.Tanh())))
    nets = {
        "resnet18": analysed(zoo.resnet18(), image),
        "densenet121": analysed(zoo.densenet121(), image),
        "maxvit_t": analysed(zoo.maxvit_t(), image),
        "chain of 4,000": analysed(deep, torch.randn(2, 4)),
    }
    for name, graph in nets.items():
        needs = dependency_graph(graph)
        lists = {node: list(needs.pred[node]) for node in graph.nodes}
        size = f"{name}, {len(graph.nodes)} nodes"
        end = output_node(graph)
        assert ancestors(end, needs) == plain_ancestors(end, lists)
        ways = {"plain": lambda: plain_ancestors(end, lists), "networkx": lambda: ancestors(end, needs)}  # noqa: B023
        rows.append(row("ancestors of the output", size, ways, chosen.repeats))
        cuts = list(cut_points(graph)) or list(possible(graph).values())
        assert longest_chain(graph, cuts) == networkx_chain(graph, cuts)
        ways = {
            "plain": lambda: longest_chain(graph, cuts),  # noqa: B023
            "networkx": lambda: networkx_chain(graph, cuts),  # noqa: B023
        }
        rows.append(row("longest chain of cuts", f"{size}, {len(cuts)} cuts", ways, chosen.repeats))
    draws = random.Random(0)
    for places, blocks in ((15, 4), (54, 4), (54, 16)):
        scores = [[draws.random() for _ in range(HEADS)] for _ in range(places)]
        for count in (1, 10):
            ours = [ranked.score for ranked in best_plans(scores, blocks, count=count)]
            theirs = shortest_plans(scores, blocks, count)
            assert all(abs(a - b) < 1e-9 for a, b in zip(ours, theirs, strict=True))
            ways = {
                "plain": lambda: best_plans(scores, blocks, count=count),  # noqa: B023
                "networkx": lambda: shortest_plans(scores, blocks, count),  # noqa: B023
            }
            size = f"{places} places, {HEADS} heads, K = {blocks}"
            rows.append(row(f"best {count} plans" if count > 1 else "best plan", size, ways, chosen.repeats))
    report(rows, [], chosen, "Questions about graphs, by plain Python and by networkx (equal results)")


if __name__ == "__main__":
    main()
