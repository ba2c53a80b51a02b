"""How many activations may cross at a cut: as few as let the blocks share the work about as evenly as any number does.

Every activation that crosses is held until the last block that reads it has run, so few are better than many; but a
U-Net whose skips nothing may cross is one block and some scraps. So the number is raised until the largest block that
balanced cuts would make is near the smallest there is. What can cross where is counted once
(:mod:`sedona_fx.passes.crossings`); for each number the chain of places is found anew, and the share of the largest
block follows from the work before each place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property

from torch import fx

from sedona_fx import passes
from sedona_fx.compile.where import Where
from sedona_fx.ir.analysed import Offered, OfferedAtAll
from sedona_fx.ir.graph import info
from sedona_fx.ir.stretches.even_chain import EvenChains
from sedona_fx.passes.cuts import Offers, aliases, possible
from sedona_fx.passes.places import PlaceFinder

NEAR = 1.1
"""A largest block within this factor of the smallest possible one is near it."""
GOOD = 1.3
"""A largest block within this factor of an even share is small enough: no more activations cross for a smaller one."""


def mark_cuts(
    train: fx.GraphModule,
    evaluation: fx.GraphModule,
    where: Where,
    *,
    named: Collection[str],
    fits: Callable[[fx.Node], bool],
) -> OfferedByLimit:
    """Mark the legal cut points and base layers in both graphs, the same in both.

    Args:
        train: the train graph with crossings counted. Only records change.
        evaluation: the eval graph, or `train` itself if the modes do not differ.
        where: where the user allows cuts.
        named: names of cut points that are legal however many activations cross there.
        fits: whether a head can stand behind a node.

    Returns:
        What is offered at the chosen number of crossing activations, and at any other.
    """
    offers = OfferedByLimit(train, evaluation, where, named=named, fits=fits)
    offers.chosen = choose(offers, where)
    for gm, own in offers.graphs.items():
        passes.cuts(gm, max_live=offers.chosen.max_live, keep=set(offers.chosen.legal), also=named, offers=own)
    return offers


class OfferedByLimit(OfferedAtAll):
    """What is offered at each number of crossing activations, found when it is asked for.

    It has the numbers at which something changes; any other may be asked for as well.

    Args:
        train, evaluation, where, named, fits: as for :func:`mark_cuts`.

    Attributes:
        graphs: each graph with its offers, that of training first.
        finder: finds places in the train graph.
        chosen: what is offered at the number that was chosen.
    """

    def __init__(
        self,
        train: fx.GraphModule,
        evaluation: fx.GraphModule,
        where: Where,
        *,
        named: Collection[str],
        fits: Callable[[fx.Node], bool],
    ) -> None:
        self.graphs = {
            gm: Offers(gm, also=named, root=where.root, no_cut=where.no_cut)
            for gm in dict.fromkeys((train, evaluation))
        }
        in_eval = possible(evaluation.graph)
        self._crossing = dict[str, int]()
        self._named = set[str]()
        for name, node in possible(train.graph).items():
            if name in in_eval:
                self._crossing[name] = max(info(node).crossing, info(in_eval[name]).crossing)
                self._named.update([] if set(named).isdisjoint(aliases(info(node))) else [name])
        self.finder = PlaceFinder(train, where.measure or "flops", self.graphs[train])
        self._train, self._wanted, self._fits = train, where.blocks - 1, fits
        self._found: dict[int, Offered] = {}
        self._even: dict[int, Offered | None] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(set(self._crossing.values())) or [1])

    def __len__(self) -> int:
        return len(set(self._crossing.values()) or {1})

    def __getitem__(self, max_live: int) -> Offered:
        if max_live not in self._found:
            self._found[max_live] = self._offer(max_live, self._reached(max_live))
        return self._found[max_live]

    def either(self, max_live: int) -> list[Offered]:
        """Return what is offered along the longest chain, and, if that is another, along the most even one."""
        if max_live not in self._even:
            beside = self._beside_the_evenest(max_live)
            self._even[max_live] = self._offer(max_live, beside) if beside is not None else None
        even = self._even[max_live]
        return [self[max_live], even] if even is not None else [self[max_live]]

    def _reached(self, max_live: int) -> set[str]:
        return {name for name, count in self._crossing.items() if count <= max_live} | self._named

    def _offer(self, max_live: int, keep: Collection[str]) -> Offered:
        legal, layers = dict[str, fx.Node](), set[fx.Node]()
        # What one graph drops, the other one has to drop as well; train comes again for what eval dropped.
        for gm in [*self.graphs, self._train][: 2 * len(self.graphs) - 1]:
            offer = self.graphs[gm].at(max_live, keep)
            keep = set(offer.legal)
            legal, layers = offer.legal, set(offer.layers)
        ends = [node for node in legal.values() if self._fits(node)]
        places = self.finder.find(ends, layers, self._wanted)
        names = {node: name for name, node in legal.items()}
        return Offered(
            max_live=max_live,
            legal=tuple(legal),
            layers=sum(node in layers for node in legal.values()),
            places=tuple(names[node] for node in places.nodes),
            rank=places.rank,
            shares=places.shares,
        )

    def _beside_the_evenest(self, max_live: int) -> set[str] | None:
        """Return the places that do not lie beside one of the evenest cuts, so that the longest chain has these.

        None: the longest chain has all places at which a base layer may end, or the model declares its base layers.
        """
        offers = self.graphs[self._train]
        held, total = offers.holdings.of, offers.holdings.total
        candidates = offers.candidates(max_live, self._reached(max_live))
        legal = self[max_live].legal
        ends = {
            name: node
            for name, node in candidates.items()
            if self._fits(node) and offers.may_end_a_layer(node, held(node), total.without(held(node)))
        }
        if ends.keys() <= set(legal) or self._train.meta.get("base_layers"):
            return None
        chain = self._chains.evenest(set(ends.values()), self._wanted + 1)
        beside = self._chains.beside(chain)
        return {name for name, node in candidates.items() if node in beside} if chain else None

    @cached_property
    def _chains(self) -> EvenChains:
        offers = self.graphs[self._train]
        nodes = offers.candidates(max(self))
        order = {node: k for k, node in enumerate(self._train.graph.nodes)}
        return EvenChains(sorted(nodes.values(), key=order.__getitem__), offers.needs, self.finder.work)


def choose(offers: OfferedByLimit, where: Where) -> Offered:
    """Return what is offered at the number of crossing activations that suits best."""
    if where.measure is None:  # the cuts are named
        return offers[where.max_live] if where.max_live is not None else _fewest_for_named(offers, where.blocks - 1)
    if where.max_live is not None:
        start = offers[where.max_live]
        return start if _is_good(offers, start, where.blocks) else _evenest(offers.either(start.max_live), where.blocks)
    start = _fewest(offers, where.blocks - 1)
    return start if _is_good(offers, start, where.blocks) else _raised(offers, start, where.blocks)


def _fewest_for_named(offers: Mapping[int, Offered], wanted: int) -> Offered:
    """Return the fewest crossings with enough base layers, else with enough cut points; cuts are named anyway."""
    for enough in (lambda offer: offer.layers >= wanted, lambda offer: len(offer.legal) >= wanted):
        if found := next((offer for offer in offers.values() if enough(offer)), None):
            return found
    return offers[max(offers)]


def _fewest(offers: Mapping[int, Offered], wanted: int) -> Offered:
    """Return the fewest crossings that give enough places, of the best rank that is to be had.

    A place that is no end of a base layer is worse than one more activation. Where places are too few at any number,
    it is the fewest crossings with most of them.
    """
    seen = []
    for offer in offers.values():
        seen.append(offer)
        if len(offer.places) >= wanted and not offer.rank:
            return offer
    if enough := [offer for offer in seen if len(offer.places) >= wanted]:
        return min(enough, key=lambda offer: offer.rank)
    return max(seen, key=lambda offer: len(offer.places))


def _is_good(offers: OfferedByLimit, offer: Offered, blocks: int) -> bool:
    """Whether blocks are even enough, or cannot be more even, or are too few anyway."""
    too_few = blocks == 1 or len(offer.places) < blocks - 1
    return too_few or _largest(offer, blocks) <= max(GOOD / blocks, NEAR * offers.finder.least_share)


def _raised(offers: OfferedByLimit, start: Offered, blocks: int) -> Offered:
    """Return the fewest crossings, from `start` on, at which the largest block is near the smallest there is."""
    limits = [max_live for max_live in offers if max_live >= start.max_live]
    # Only if it helps where anything may cross, another chain than the longest is tried elsewhere.
    ways = offers.either(limits[-1])
    allowed = [way for way in ways if way.rank <= start.rank] or ways
    another = _evenest(allowed, blocks) is not ways[0]
    tried, least = [start], min(_largest(way, blocks) for way in (start, *ways) if way.rank <= start.rank)
    for max_live in limits:
        found = offers.either(max_live) if another else [offers[max_live]]
        tried += [offer for offer in found if offer.rank <= start.rank]
        if _largest(tried[-1], blocks) <= NEAR * least:
            break
    least = min(least, *(_largest(offer, blocks) for offer in tried))
    near = (offer for offer in tried if _largest(offer, blocks) <= NEAR * least)
    return next(near, min(tried, key=lambda offer: _largest(offer, blocks)))


def _evenest(tried: Sequence[Offered], blocks: int) -> Offered:
    """Return the offer whose largest block is smallest; the first one, if it is near that."""
    best = min(tried, key=lambda offer: _largest(offer, blocks))
    return tried[0] if _largest(tried[0], blocks) <= NEAR * _largest(best, blocks) else best


def _largest(offer: Offered, blocks: int) -> float:
    return offer.shares.least_largest(blocks)
