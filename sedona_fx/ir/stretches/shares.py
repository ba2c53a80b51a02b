"""How evenly blocks can share the work of a graph: what lies before the places of a chain, and the least largest block.

Blocks that end at places of which each needs all earlier ones are differences of growing sets of nodes. So one number a
place, the work of everything that it needs, says what any block between two places costs.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from sedona_fx.ir.graph import info

Measure = Literal["flops", "activation_bytes"]
"""What blocks share: FLOPs of the forward pass, or the bytes that autograd keeps for the backward pass."""


def node_work(graph: fx.Graph, measure: Measure) -> dict[fx.Node, int]:
    """Return what every node costs, heads and boundaries apart; nodes that cost nothing are left out.

    Args:
        graph: annotated.
        measure: ``"flops"``: of the forward pass. Where parameters are frozen: of a training step, three times those of
            the forward pass, and once those of nodes in front of which nothing trains. ``"activation_bytes"``: a
            storage counts at the first node that keeps it.

    Returns:
        Node -> its cost. Where nothing is counted by one measure, it is the other; where both count nothing, every node
        with a parameter costs 1.
    """
    ways: list[Callable[[fx.Graph], dict[fx.Node, int]]] = [_flops, _bytes, _readers]
    for way in ways if measure == "flops" else [_bytes, _flops, _readers]:
        if work := way(graph):
            break
    return work


def work_before(
    ends: Sequence[fx.Node], needs: Mapping[fx.Node, Sequence[fx.Node]], work: Mapping[fx.Node, int]
) -> list[int]:
    """Return for each of the ends, of which each needs all earlier ones, the work of everything that it needs.

    Args:
        ends: in the order of the program.
        needs: what must run before each node (:func:`~sedona_fx.ir.flow.predecessors`).
        work: as of :func:`node_work`.
    """
    sums, seen, total = list[int](), set[fx.Node](), 0
    for end in ends:
        stack = [end]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                total += work.get(node, 0)
                stack.extend(needs[node])
        sums.append(total)
    return sums


@dataclass(frozen=True)
class Shares:
    """A chain of places with the work before each of them.

    Attributes:
        before: the work before each place, ascending.
        total: the work of the graph.
    """

    before: tuple[int, ...]
    total: int

    def least_largest(self, blocks: int) -> float:
        """Return the least share of all work that the largest block can have, from 1 / `blocks` to 1.

        It is infinite if there are too few places for that many blocks.
        """
        if len(self.before) < blocks - 1:
            return float("inf")
        if not self.total:
            return 1.0
        low, high = -(-self.total // blocks), self.total
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._reaches(middle, blocks) else (middle + 1, high)
        return low / self.total

    def _reaches(self, most: int, blocks: int) -> bool:
        """Whether blocks without more work than `most` reach the end; cuts that are left over make none larger."""
        done = 0
        for _ in range(blocks - 1):
            place = bisect.bisect_right(self.before, done + most) - 1
            done = max(done, self.before[place] if place >= 0 else 0)
        return self.total - done <= most

    def largest(self) -> float:
        """Return the share of the largest block if a block ends at every place."""
        return self.widest_gap()[1]

    def widest_gap(self) -> tuple[int, float]:
        """Return the stretch between neighbouring places with most work: the place that it ends at, and its share."""
        edges = [0, *self.before, self.total]
        gaps = [after - before for before, after in itertools.pairwise(edges)]
        widest = gaps.index(max(gaps))
        return widest, gaps[widest] / max(1, self.total)


def _flops(graph: fx.Graph) -> dict[fx.Node, int]:
    nodes = list(graph.nodes)
    frozen = any(set(info(node).parameters) - set(info(node).trained) for node in nodes)
    if not frozen:
        return {node: flops for node in nodes if (flops := info(node).flops)}
    trains, work = set[fx.Node](), {}
    for node in nodes:
        if info(node).trained or any(source in trains for source in node.all_input_nodes):
            trains.add(node)
        if info(node).flops:
            work[node] = info(node).flops * (3 if node in trains else 1)
    return work


def _bytes(graph: fx.Graph) -> dict[fx.Node, int]:
    work, counted = {}, set[int]()
    for node in graph.nodes:
        saved = info(node).saved
        if kept := sum(size for storage, size in saved.items() if storage not in counted):
            work[node] = kept
        counted.update(saved)
    return work


def _readers(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: 1 for node in graph.nodes if info(node).parameters}
