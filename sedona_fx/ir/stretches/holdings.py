"""Which parameters the blocks hold that may be cut out of a graph, told for every place where a block could end.

A block that ends at a node holds what that node needs, and the place of a node in the program says nothing about that:
the end of one layer may stand behind the convolutions of the next. So parameters are counted along the data flow.

Sets of parameters are bit sets (integers), because a net has thousands of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from sedona_fx.ir.flow import ancestors, dependency_graph, readers_before_writes
from sedona_fx.ir.graph import info, output_node


@dataclass(frozen=True)
class Held:
    """Parameters, as bit sets. Those that only training outputs need are left out.

    Attributes:
        weights: operations with a parameter of two or more dimensions, each known by its first parameter.
        trained: parameters that require a gradient.
        frozen: parameters that require none.
    """

    weights: int = 0
    trained: int = 0
    frozen: int = 0

    def __or__(self, other: Held) -> Held:
        return Held(self.weights | other.weights, self.trained | other.trained, self.frozen | other.frozen)

    def without(self, other: Held) -> Held:
        """Return what is in this one and not in the other."""
        return Held(self.weights & ~other.weights, self.trained & ~other.trained, self.frozen & ~other.frozen)


_NOTHING = Held()


class Holdings:
    """What every block would hold that begins at the net's inputs.

    Args:
        graph: annotated, with `training_only` known.

    Attributes:
        total: what the primary output needs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        before_writes = readers_before_writes(graph)
        # A node that reads a value before it is overwritten belongs to the block that overwrites it.
        needs = dependency_graph(graph)
        self._sources = {n: {*needs.pred[n], *before_writes.get(n, ())} for n in graph.nodes}
        self._used = ancestors(output_node(graph), needs)
        self._bits: dict[str, int] = {}
        self._held: dict[fx.Node, Held] = {}
        for node in graph.nodes:
            self._held[node] = self._gathered(node, self._held, self._own(node))
        self.total = self._held[output_node(graph)]

    def of(self, node: fx.Node) -> Held:
        """Return what a block would hold that begins at the inputs and ends at a node."""
        return self._held[node]

    def select(self, ends: Collection[fx.Node], keeps: Callable[[fx.Node, Held, Held], bool]) -> list[fx.Node]:
        """Return those nodes at which blocks shall end, decided one by one in the order of the program.

        Args:
            ends: the nodes to choose from.
            keeps: ``keeps(node, block, rest)`` says whether a block shall end at a node, where the block would begin at
                the nodes kept before that it needs; `rest` is what is left behind it.
        """
        wanted, kept = set(ends), list[fx.Node]()
        covered: dict[fx.Node, Held] = {}  # what the kept ones that a node needs hold, itself included
        for node, held in self._held.items():
            covered[node] = self._gathered(node, covered)
            if node in wanted and keeps(node, held.without(covered[node]), self.total.without(held)):
                covered[node] = held
                kept.append(node)
        return kept

    def select_of_chain(self, ends: Sequence[fx.Node], keeps: Callable[[fx.Node, Held, Held], bool]) -> list[fx.Node]:
        """Return what :meth:`select` does for ends in the order of the program of which each needs all earlier ones."""
        kept, covered = list[fx.Node](), _NOTHING
        for node in ends:
            held = self._held[node]
            if keeps(node, held.without(covered), self.total.without(held)):
                covered = held
                kept.append(node)
        return kept

    def _gathered(self, node: fx.Node, values: Mapping[fx.Node, Held], own: Held = _NOTHING) -> Held:
        """Return the union of what the sources of a node have and of what it has itself."""
        result = own
        for source in self._sources[node]:
            if (value := values[source]) is not result and value is not _NOTHING:
                result = value if result is _NOTHING else result | value
        return result

    def _own(self, node: fx.Node) -> Held:
        """Return what a node itself reads."""
        record = info(node)
        if record.training_only or not record.parameters:
            return _NOTHING
        frozen = set(record.parameters) - set(record.trained)
        return Held(
            weights=self._bits_of(record.parameters[:1] if record.weighty else ()),
            trained=self._bits_of(record.trained if node in self._used else ()),
            frozen=self._bits_of(frozen),
        )

    def _bits_of(self, names: Collection[str]) -> int:
        bits = 0
        for name in names:
            bits |= 1 << self._bits.setdefault(name, len(self._bits))
        return bits
