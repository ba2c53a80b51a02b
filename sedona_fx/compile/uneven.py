"""Why blocks are uneven, or fewer than were asked for, and what would help: for ``print(net)`` and for errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from sedona_fx.compile.crossing_limit import NEAR
from sedona_fx.compile.request import Request
from sedona_fx.errors import HeadError
from sedona_fx.heads.registry import default_candidates
from sedona_fx.ir.analysed import Analysed, Offered
from sedona_fx.ir.cost import Cost
from sedona_fx.ir.flow import ancestors, dependency_graph, predecessors
from sedona_fx.ir.graph import describe, info
from sedona_fx.ir.stretches.shares import Shares, node_work, work_before
from sedona_fx.passes.cuts import is_inside, possible, resolve
from sedona_fx.report.text import UNEVEN, largest_block

_WHOLE = 0.7
"""A node with this part of a stretch's work is what the stretch is about."""
_MUCH = 1 / 3
"""A head with this part of its block's FLOPs is what makes the block large."""


def why_uneven(
    request: Request, analysed: Analysed, cuts: Sequence[str], costs: Sequence[Cost], heads: Sequence[Cost | None]
) -> str:
    """Return why the largest block has more than 1.5 times an even share, and what would help; empty if it has not.

    Args:
        request: what the user asked for.
        analysed: the model's graphs.
        cuts: names of the chosen cut points.
        costs: of the blocks, heads included.
        heads: the cost of each cut's head, or None.
    """
    index, share, _ = largest_block(costs)
    most = UNEVEN / len(costs)
    if share <= most:
        return ""
    told, head = _Told(request, analysed), [*heads, None][index]
    if head is not None and head.flops > _MUCH * costs[index].flops:
        part = head.flops / costs[index].flops
        return _lines([f"its head has {part:.0%} of that"], ["smaller heads, heads=[...]"])
    own = told.shares(cuts).largest()
    if own <= most:
        frozen = any(not parameter.requires_grad for parameter in analysed.train.parameters())
        without = "frozen parameters run forward only: of a training step" if frozen else "heads count: without them"
        return _lines([f"{without} the largest block has {own:.0%}"], [])
    offer = told.best(len(costs))
    best = told.shares(offer.places).least_largest(len(costs))
    why, what = list[str](), list[str]()
    if best < own / NEAR:
        why.append(told.chosen_by())
        what.append(f"search='balanced', which makes the largest block {best:.0%} without its head")
    if best > most or not why:
        why.append(told.widest_gap(offer))
        what += [*told.other_limit(len(costs), best), *told.options(offer), *told.fewer_blocks(offer, len(costs))]
    return _lines(why, what)


def too_few(request: Request, analysed: Analysed, places: int) -> str:
    """Return what is to be said of a model that has fewer useful places than the blocks asked for need.

    Args:
        request: what the user asked for.
        analysed: the model's graphs.
        places: how many there are.
    """
    told, offer = _Told(request, analysed), analysed.offered.chosen
    share = told.shares(offer.places).least_largest(places + 1)
    crossing = f"{offer.max_live} activation{'s' if offer.max_live > 1 else ''}"
    best = f" The largest of these would have {share:.0%} of the FLOPs, with {crossing} at most crossing a cut."
    others = list(analysed.offered.values())
    most = max(others, key=lambda other: len(other.places))
    more = next((other for other in others if len(other.places) >= request.blocks - 1), most)
    what = [f"blocks={places + 1}"]
    if len(more.places) > places:
        enough = min(len(more.places) + 1, request.blocks)
        what.append(f"max_live={more.max_live}, which is enough for {enough} blocks")
    what += told.options(offer)
    what.append("cuts=[...] by hand, which may leave a block without parameters")
    return f"{best if places else ''} What would help: {'; '.join(what)}."


def _lines(why: Sequence[str], what: Sequence[str]) -> str:
    return "\n".join(f"  {title}: {'; '.join(parts)}" for title, parts in (("why", why), ("helps", what)) if parts)


class _Told:
    """What is to be told of a net. Shares are of FLOPs, without heads.

    Args:
        request: what the user asked for.
        analysed: the model's graphs.
    """

    def __init__(self, request: Request, analysed: Analysed) -> None:
        self.request, self.analysed, self.graph = request, analysed, analysed.train.graph
        self.needs, self.work = predecessors(self.graph), node_work(self.graph, "flops")
        self.nodes = {**possible(self.graph), **resolve(self.graph)}

    def shares(self, names: Sequence[str]) -> Shares:
        """Return the work before each of some cut points."""
        before = work_before([self.nodes[name] for name in names], self.needs, self.work)
        return Shares(tuple(before), sum(self.work.values()))

    def best(self, blocks: int) -> Offered:
        """Return what is offered to the search; if the cuts are named, what would be offered to one."""
        if self.request.measure is not None or self.request.max_live is not None:
            return self.analysed.offered.chosen
        return self._evenest(blocks)

    def _evenest(self, blocks: int) -> Offered:
        offered = self.analysed.offered
        offers = [way for max_live in offered for way in offered.either(max_live)]
        return min(offers, key=lambda offer: self.shares(offer.places).least_largest(blocks))

    def chosen_by(self) -> str:
        """Return who chose the cuts, in words."""
        request = self.request
        budget = " within the budget" if request.limits is not None else ""
        if request.plan is not None:
            return "the cuts are those of the plan"
        if request.cuts is not None:
            return "the cuts are your own"
        balances = " by activation bytes" if request.search.balances == "activation_bytes" else ""
        return f"the cuts were chosen by {type(request.search).__name__}{balances}{budget}"

    def widest_gap(self, offer: Offered) -> str:
        """Return why the stretch between neighbouring places with most work is not cut, in words."""
        shares = self.shares(offer.places)
        at, share = shares.widest_gap()
        end_node = self.nodes[offer.places[at]] if at < len(offer.places) else None
        stretch = self._between(offer.places, at)
        # Where the end is all there is, as with a module that is kept whole, it is the reason itself.
        inside = [node for node in stretch if node is not end_node] or stretch
        start = f"behind {offer.places[at - 1]!r}" if at else "the inputs"
        end = f"{offer.places[at]!r}" if at < len(offer.places) else "the output"
        return f"from {start} to {end} there is {share:.0%} of the work and no place to cut: {self._reason(inside)}"

    def _between(self, places: Sequence[str], at: int) -> list[fx.Node]:
        """Return the nodes of the stretch that ends at a place, in the order of the program."""
        needs = dependency_graph(self.graph)
        before = ancestors(self.nodes[places[at - 1]], needs) if at else set[fx.Node]()
        until = ancestors(self.nodes[places[at]], needs) if at < len(places) else set(self.graph.nodes)
        return [node for node in self.graph.nodes if node in until - before and node.op not in ("get_attr", "output")]

    def _reason(self, inside: Sequence[fx.Node]) -> str:
        """Return why no block ends in a stretch, in words."""
        train, request, chosen = self.analysed.train, self.request, self.analysed.offered.chosen
        total = sum(self.work.get(node, 0) for node in inside)
        heaviest = max(inside, key=lambda node: self.work.get(node, 0))
        if self.work.get(heaviest, 0) > _WHOLE * total:
            module = train.get_submodule(str(heaviest.target)) if heaviest.op == "call_module" else None
            whole = ", which is kept whole" if module is not None and any(module.children()) else ""
            return f"most of it is one operation, {describe(heaviest)}{whole}"
        ends = [node for node in inside if info(node).crossing]
        if request.root and not any(is_inside(node, request.root) for node in ends):
            return f"it lies outside of root={request.root!r}"
        if any(is_inside(node, path) for node in ends for path in request.no_cut):
            return f"no_cut={list(request.no_cut)} forbids it"
        legal = {self.nodes[name] for name in chosen.legal}
        if refused := [node for node in ends if node in legal and not self._has_head(node)]:
            names = [str(info(node).cut) for node in refused]
            return f"no built-in head fits behind {', '.join(map(repr, names[:3]))}{', ...' if names[3:] else ''}"
        fewest = min((info(node).crossing for node in ends if node not in legal), default=0)
        if fewest > chosen.max_live:
            return f"{fewest} activations or more cross everywhere in it, and {chosen.max_live} may"
        if fewest:
            return "its branches lie side by side, and blocks follow one another"
        done = itertools.accumulate(self.work.get(node, 0) for node in inside)
        if any(info(node).crossing and 0 < before < total for node, before in zip(inside, done, strict=True)):
            return "a cut in it would leave a block without weights of its own"
        return (
            "a block can end at none of its values (a float tensor whose rows are examples, which depends on "
            "parameters, is not overwritten through a view, and lets a gradient reach every weight before it)"
        )

    def _has_head(self, node: fx.Node) -> bool:
        """Whether a head that the user gave, or a built-in one, can stand behind a cut point."""
        if not self.request.where.default_heads or info(node).cut is None:
            return True
        try:
            default_candidates(self.analysed.contexts[str(info(node).cut)])
        except HeadError:
            return False
        return True

    def other_limit(self, blocks: int, best: float) -> list[str]:
        """Return the number of crossing activations that would make blocks more even, in words, if there is one."""
        offer = self._evenest(blocks)
        share = self.shares(offer.places).least_largest(blocks)
        if share >= best / NEAR or offer.max_live == self.analysed.offered.chosen.max_live:
            return []
        offered = self.analysed.offered
        ways = [way for max_live in offered for way in offered.either(max_live)]
        near = next(way for way in ways if self._share(way, blocks) <= NEAR * share)
        return [f"max_live={near.max_live}, for {self._share(near, blocks):.0%}"]

    def _share(self, offer: Offered, blocks: int) -> float:
        return self.shares(offer.places).least_largest(blocks)

    def options(self, offer: Offered) -> list[str]:
        """Return the options that are in the way, in words."""
        request = self.request
        legal = [self.nodes[name] for name in offer.legal]
        kept = list(request.leaf_modules)
        ways = [
            (bool(request.no_cut), f"fewer modules in no_cut={list(request.no_cut)}"),
            (bool(kept), f"fewer modules in leaf_modules={kept}"),
            (bool(request.root), f"another root than {request.root!r}"),
            (not all(map(self._has_head, legal)), "heads of your own, heads=[...]"),
        ]
        return [text for applies, text in ways if applies]

    def fewer_blocks(self, offer: Offered, blocks: int) -> list[str]:
        """Return the most blocks, fewer than these, that are even, in words, if there are such."""
        shares = self.shares(offer.places)
        for fewer in range(blocks - 1, 1, -1):
            if (share := shares.least_largest(fewer)) <= UNEVEN / fewer:
                return [f"blocks={fewer}, for {share:.0%}"]
        return []
