"""The places that a search chooses from: the ends of base layers, and, where these are too few, a few other legal cuts.

A net may be wanted in more blocks than it has base layers: ResNet-32 in sixteen, its stem and fifteen residual blocks.
Base layers are good places, so all of them stay, and as few others as are needed are added one by one: each splits the
largest block that can be split, as evenly as it can be. A place that ends a layer, and leaves more than the classifier,
comes before one that does not; no place leaves a block without parameters to train.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import fx

from sedona_fx.ir.graph import cut_points, info
from sedona_fx.ir.stretches.holdings import Held
from sedona_fx.ir.stretches.shares import Measure, Shares, node_work, work_before
from sedona_fx.passes.cuts import Offers


@dataclass(frozen=True)
class Places:
    """Places to choose from.

    Attributes:
        nodes: in the order of the program; fewer than are wanted if there are no more.
        rank: 0 if all of them end base layers, else the rank of the worst that was added, from 1.
        shares: the work before each of them.
    """

    nodes: tuple[fx.Node, ...]
    rank: int
    shares: Shares


@dataclass(frozen=True)
class _Split:
    """A block split in two: the place in between, what both parts hold, and what is left behind the place."""

    place: fx.Node
    parts: tuple[Held, Held]
    rest: Held


class PlaceFinder:
    """Finds places in one graph; what all questions about it share is worked out once.

    Args:
        gm: annotated, with crossings counted. It is not changed.
        measure: of the shares. Blocks are split by their FLOPs whatever it is.
        offers: those of this graph, where they are at hand.

    Attributes:
        work: node -> what it costs by the measure.
    """

    def __init__(self, gm: fx.GraphModule, measure: Measure = "flops", offers: Offers | None = None) -> None:
        self.offers = offers if offers is not None else Offers(gm)
        self.needs, self.holdings = self.offers.needs, self.offers.holdings
        self._flops = node_work(gm.graph, "flops")
        self.work = self._flops if measure == "flops" else node_work(gm.graph, measure)
        self._total = sum(self.work.values())

    @property
    def least_share(self) -> float:
        """The share of the node that has most work; no largest block has less."""
        return max(self.work.values(), default=0) / max(1, self._total)

    def shares(self, ends: Sequence[fx.Node]) -> Shares:
        """Return the work before each of the ends, which are in the order of the program, each needing all earlier."""
        return Shares(tuple(work_before(ends, self.needs, self.work)), self._total)

    def find(self, ends: Sequence[fx.Node], layers: Collection[fx.Node], wanted: int) -> Places:
        """Return the ends of base layers, and as few other ends as make the number wanted.

        Args:
            ends: where a block may end, in the order of the program, each needing all earlier ones.
            layers: those of them that end base layers.
            wanted: how many places are needed, K - 1.
        """
        chosen = [k for k, end in enumerate(ends) if end in layers]
        rank = 0
        if len(chosen) < wanted:
            before = work_before(ends, self.needs, self._flops)
            edges = [*before, sum(self._flops.values()), 0]  # the one at -1 is the start of the graph
            for allowed in _RANKS:
                rank += len(chosen) < wanted
                while len(chosen) < wanted and (added := self._best_split(ends, edges, chosen, allowed)) is not None:
                    bisect.insort(chosen, added)
        nodes = tuple(ends[k] for k in chosen)
        return Places(nodes, rank, self.shares(nodes))

    def _best_split(
        self, ends: Sequence[fx.Node], edges: Sequence[int], chosen: Sequence[int], allowed: _Allowed
    ) -> int | None:
        """Return the place that splits the largest block that can be split, most evenly.

        Of equal ones it is the first that ends a layer (what a shortcut does to it comes later), else the last.
        """
        starts, stops = [-1, *chosen], [*chosen, len(ends)]
        for block in sorted(range(len(starts)), key=lambda k: edges[starts[k]] - edges[stops[k]]):
            start, stop = starts[block], stops[block]
            held = self.holdings.of(ends[start]) if start >= 0 else Held()
            last = self.holdings.of(ends[stop]) if stop < len(ends) else self.holdings.total
            best: tuple[int, int, int] | None = None
            for k in range(start + 1, stop):
                first = self.holdings.of(ends[k])
                parts = first.without(held), last.without(first)
                if allowed(self.offers, _Split(ends[k], parts, self.holdings.total.without(first))):
                    larger = max(edges[k] - edges[start], edges[stop] - edges[k])
                    key = larger, -k if self.offers.is_followed(ends[k]) else k, k
                    best = min(best or key, key)
            if best is not None:
                return best[2]
        return None


_Allowed = Callable[[Offers, _Split], bool]


def _is_a_layer(offers: Offers, split: _Split) -> bool:
    """Whether a layer ends at the place, and more than a classifier follows."""
    return _ends_a_layer(offers, split) and split.rest.weights.bit_count() > 1


def _ends_a_layer(offers: Offers, split: _Split) -> bool:
    return _has_weights(offers, split) and not offers.is_followed(split.place)


def _has_weights(offers: Offers, split: _Split) -> bool:
    return all(part.weights and part.trained for part in split.parts)


def _trains(offers: Offers, split: _Split) -> bool:
    return all(part.trained for part in split.parts)


_RANKS: tuple[_Allowed, ...] = (_is_a_layer, _ends_a_layer, _has_weights, _trains)
"""What may be added, the best first."""


def marked_places(gm: fx.GraphModule, among: Collection[str], wanted: int) -> list[str]:
    """Return the names of the places of an ANALYSED graph: the ends of base layers, and the fewest others.

    Args:
        gm: ANALYSED.
        among: names of cut points; others are left out.
        wanted: how many places are needed; fewer are returned if there are no more.
    """
    ends = [node for node in cut_points(gm.graph) if info(node).cut in among]
    places: Sequence[fx.Node] = [node for node in ends if info(node).base_layer]
    if len(places) < wanted:
        places = PlaceFinder(gm).find(ends, places, wanted).nodes
    return [str(info(node).cut) for node in places]
