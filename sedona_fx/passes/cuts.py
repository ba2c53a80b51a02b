"""TRACED, annotated -> ANALYSED: choose the legal cut points, name them, and mark those that end a base layer.

A block can end at many places (:mod:`sedona_fx.passes.crossings`), and not all are worth offering to a search. Legal
are those where at most ``max_live`` activations cross, which lie inside ``root`` and outside of modules that the user
keeps whole, and each of which needs all earlier ones: of two towers side by side, only one is cut. A cut that the user
names is legal wherever a block can end.

A plan holds cuts by name, so names come from the user's module paths and are the same in the train and the eval graph.
Base layers are the unit of search: a convolution, its norm and its activation make one base layer, although a block may
end after each of the three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx, nn

from sedona_fx.ir.flow import dependency_graph, longest_chain, predecessors
from sedona_fx.ir.graph import NodeInfo, info, operation
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase
from sedona_fx.ir.stretches.holdings import Held, Holdings

_FOLLOWERS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.Identity,  # stands where one of the others was removed
)
_Select = Callable[[Sequence[fx.Node], Callable[[fx.Node, Held, Held], bool]], list[fx.Node]]
_FOLLOWER_WORDS = ("norm", "relu", "gelu", "silu", "swish", "sigmoid", "tanh", "mish", "elu", "pool", "dropout", "drop")


@graph_pass(Phase.ANALYSED)
def cuts(
    gm: fx.GraphModule,
    *,
    max_live: int = 1,
    keep: Collection[str] | None = None,
    also: Collection[str] = (),
    root: str = "",
    no_cut: Collection[str] = (),
    offers: Offers | None = None,
) -> fx.GraphModule:
    """Name every legal cut point in its node's record, and mark those that end a base layer.

    Before: TRACED, annotated, with crossings counted. After: ANALYSED; `cut` and `base_layer` of the records are set.

    Args:
        gm: only the records of its nodes change.
        max_live: how many activations may cross at a cut point.
        keep: names of cut points that are legal in the other mode's graph too; others are dropped. None: drop none.
        also: names of cut points that are legal however many activations cross there, whatever lies around them.
        root: module path; there are no cuts outside of it. Its own end counts as inside.
        no_cut: module paths; there are no cuts inside of these.
        offers: the :class:`Offers` of this graph for the same `also`, `root` and `no_cut`, where these are at hand.
    """
    offers = offers if offers is not None else Offers(gm, also=also, root=root, no_cut=no_cut)
    offer = offers.at(max_live, keep)
    for node in gm.graph.nodes:
        info(node).cut, info(node).base_layer = None, False
    for name, node in offer.legal.items():
        info(node).cut = name
    for node in offer.layers:
        info(node).base_layer = True
    return gm


@dataclass(frozen=True)
class Offer:
    """Where blocks may end in a graph, at one number of activations that may cross.

    Attributes:
        legal: name -> node of every legal cut point, in the order of the program.
        layers: those of them that end base layers, in the same order.
    """

    legal: dict[str, fx.Node]
    layers: tuple[fx.Node, ...]


class Offers:
    """Where blocks may end in a graph, for any number of crossing activations; what that does not change is kept.

    Args:
        gm: TRACED, annotated, with crossings counted. It is not changed.
        also, root, no_cut: as for :func:`cuts`.

    Attributes:
        needs: what must run before each node.
        holdings: of the graph.
    """

    def __init__(
        self, gm: fx.GraphModule, *, also: Collection[str] = (), root: str = "", no_cut: Collection[str] = ()
    ) -> None:
        self.gm = gm
        self.needs = predecessors(gm.graph)
        self.holdings = Holdings(gm.graph)
        self._order = {node: k for k, node in enumerate(gm.graph.nodes)}
        self._followed: dict[fx.Node, bool] = {}
        self._candidates: dict[str, fx.Node] = {}
        self._named: dict[str, fx.Node] = {}
        places = possible(gm.graph)
        if also:
            self._named = {name: n for name, n in places.items() if not set(also).isdisjoint(aliases(info(n)))}
        beside = self._beside(list(self._named.values()))
        for name, node in places.items():
            inside = is_inside(node, root) and not any(_is_strictly_inside(node, path) for path in no_cut)
            if inside and name not in self._named and node not in beside:
                self._candidates[name] = node

    def _beside(self, named: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the nodes that lie beside one of the user's cuts, none if these lie beside each other."""
        behind, result = set(named[:1]), set[fx.Node]()
        for cut in named:
            if cut not in behind:
                return set()
            before, behind = {cut}, {cut}
            for node in reversed(self.gm.graph.nodes):
                before.update(self.needs[node] if node in before else ())
            for node in self.gm.graph.nodes:
                behind.update([] if behind.isdisjoint(self.needs[node]) else [node])
            result.update(node for node in self.gm.graph.nodes if node not in before and node not in behind)
        return result

    def candidates(self, max_live: int, keep: Collection[str] | None = None) -> dict[str, fx.Node]:
        """Return name -> node of the places to choose from, of which some lie side by side. Arguments as for `at`."""
        return {
            name: node
            for name, node in {**self._candidates, **self._named}.items()
            if info(node).crossing <= max_live and (keep is None or name in keep)
        }

    def at(self, max_live: int, keep: Collection[str] | None = None) -> Offer:
        """Return what is offered where at most `max_live` activations cross.

        Args:
            max_live: how many.
            keep: as for :func:`cuts`.
        """
        named = {name: node for name, node in self._named.items() if keep is None or name in keep}
        candidates = self.candidates(max_live, keep)
        chain = longest_chain(self.gm.graph, candidates.values(), self.needs)
        legal = set(self.holdings.select_of_chain(chain, _trains) if self.holdings.total.frozen else chain)
        found = {name: node for name, node in candidates.items() if node in legal} | named
        found = dict(sorted(found.items(), key=lambda item: self._order[item[1]]))
        select = self.holdings.select if named else self.holdings.select_of_chain
        return Offer(found, tuple(self._base_layers(list(found.values()), select)))

    def is_followed(self, node: fx.Node) -> bool:
        """Whether the only reader of a node belongs to the layer that the node is of."""
        if node not in self._followed:
            self._followed[node] = _is_followed(self.gm, node)
        return self._followed[node]

    def _base_layers(self, legal: Sequence[fx.Node], select: _Select) -> list[fx.Node]:
        """Return the legal cut points that end base layers: those that the model declares, else those of a rule.

        The rule takes a cut point if

        - it needs a weight of two or more dimensions, and a parameter that requires a gradient, that those taken before
          it do not need;
        - it is of real numbers, which heads read;
        - its only reader is no norm, activation, pool or dropout. One such reader among several, as in a pre-norm
          residual block, begins something new;
        - more than one weight is left after it: a head there would only repeat the classifier that follows. One of the
          parameters left requires a gradient.

        What a cut point needs is asked of the data flow, and not of the order of the program, in which the end of a
        layer may come after the beginning of the next: an ``nn.Identity`` on a shortcut is such an end.
        """
        if declared := self.gm.meta.get("base_layers"):
            by_alias = {name: node for node in legal for name in aliases(info(node))}
            # The last one ends where the net does.
            ends = {by_alias[path] for path in declared[:-1] if path in by_alias}
            return select([node for node in legal if node in ends], _ends_declared)
        return select(legal, self.may_end_a_layer)

    def may_end_a_layer(self, node: fx.Node, block: Held, rest: Held) -> bool:
        """Whether a base layer may end at a node, by the rule: given what its block holds and what is left behind."""
        enough = block.weights and block.trained and rest.weights.bit_count() > 1 and rest.trained
        return bool(enough) and not info(node).is_complex and not self.is_followed(node)


def possible(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return name -> node of the places where a block can end, in the order of the graph."""
    places: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if info(node).crossing:
            places.setdefault(cut_name(info(node)), node)
    return places


def cut_name(record: NodeInfo) -> str:
    """Return the name of a cut: the path of the innermost module whose output the node is, else the node's site."""
    return record.returned_by[0] if record.returned_by else record.site


def aliases(record: NodeInfo) -> Iterator[str]:
    """Yield every name by which a user may refer to a cut point."""
    yield from record.returned_by
    yield record.site


def resolve(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the legal cut points of an ANALYSED graph under every name that a user may give them."""
    return {name: node for node in graph.nodes if info(node).cut is not None for name in aliases(info(node))}


def base_layers(gm: fx.GraphModule) -> list[str]:
    """Return the names of the cut points that end base layers, in the order of the graph."""
    return [str(info(node).cut) for node in gm.graph.nodes if info(node).base_layer]


def follow_one_another(graph: fx.Graph, nodes: Sequence[fx.Node]) -> bool:
    """Whether each of the nodes needs the one before it, so that blocks which end there form a chain."""
    needs = dependency_graph(graph)
    return all(nx.has_path(needs, first, second) for first, second in itertools.pairwise(nodes))


def start_of(graph: fx.Graph, path: str) -> fx.Node | None:
    """Return the node to cut at for a cut *before* a module: the latest activation that it reads from outside."""
    inside = {node for node in graph.nodes if _is_below(info(node).path, path)}
    read = {source for node in inside for source in node.all_input_nodes} - inside
    return next((node for node in reversed(graph.nodes) if node in read and info(node).is_live), None)


def is_inside(node: fx.Node, module: str) -> bool:
    """Whether a node is computed inside a module, or is the module's output."""
    return _is_below(info(node).path, module) or _is_output_of(node, module)


def _is_strictly_inside(node: fx.Node, module: str) -> bool:
    return _is_below(info(node).path, module) and not _is_output_of(node, module)


def _is_below(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _is_output_of(node: fx.Node, module: str) -> bool:
    return module in (name.partition("#")[0] for name in info(node).returned_by) or str(node.target) == module


def _trains(end: fx.Node, block: Held, rest: Held) -> bool:
    """Whether a block and what is left behind it have parameters to train, or none that are frozen either."""
    return bool(block.trained or not block.frozen) and bool(rest.trained or not rest.frozen)


def _ends_declared(node: fx.Node, block: Held, rest: Held) -> bool:
    """Whether a base layer that the model declares has something to train, and leaves something."""
    return bool(block.weights and rest.weights) and _trains(node, block, rest)


def _is_followed(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the only reader of a node belongs to the layer that the node is of."""
    readers = [user for user in node.users if not info(user).training_only]
    return len(readers) == 1 and _is_follower(gm, readers[0])


def _is_follower(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node belongs to the layer before it: a norm, an activation, a pool or a dropout."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        is_activation = type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())
        named_like_one = any(word in type(module).__name__.lower() for word in ("norm", "pool", "drop"))
        return isinstance(module, _FOLLOWERS) or is_activation or named_like_one
    return any(word in operation(node).lower() for word in _FOLLOWER_WORDS)
