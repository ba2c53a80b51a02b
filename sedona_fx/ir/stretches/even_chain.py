"""The chain of places that shares the work of a graph most evenly, among all chains there are.

Where branches lie side by side, a chain goes through one of them, and which one decides how even blocks can be: the
longest chain through a feature pyramid passes by all levels but one, whose work then falls into the last block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import fx

MOST_PLACES = 1500
"""With more candidates than this the table of which needs which would be too large; no chain is found then."""


class EvenChains:
    """All chains over some candidates.

    Args:
        candidates: nodes, in the order of the program.
        needs: what must run before each node of the graph (:func:`~sedona_fx.ir.flow.predecessors`).
        work: node -> what it costs.
    """

    def __init__(
        self,
        candidates: Sequence[fx.Node],
        needs: Mapping[fx.Node, Sequence[fx.Node]],
        work: Mapping[fx.Node, int],
    ) -> None:
        self.candidates = list(candidates) if len(candidates) <= MOST_PLACES else []
        self._index = {node: k for k, node in enumerate(self.candidates)}
        self._total = sum(work.values())
        costly = {node: k for k, node in enumerate(work)}
        costs = np.array([work[node] for node in costly], dtype=np.int64)
        # Bit sets: the candidates, and the nodes with a cost, that a node needs, itself included.
        places, before = dict[fx.Node, int](), dict[fx.Node, int]()
        for node, sources in needs.items() if self.candidates else ():
            places[node] = 1 << self._index[node] if node in self._index else 0
            before[node] = 1 << costly[node] if node in costly else 0
            for source in sources:
                places[node] |= places[source]
                before[node] |= before[source]
        count = len(self.candidates)
        self._before = np.array([int(costs[_bits(before[n], len(costs))].sum()) for n in self.candidates], np.int64)
        self._needs = np.array([_bits(places[n], count) for n in self.candidates], bool).reshape(count, count)

    def evenest(self, among: Collection[fx.Node], blocks: int) -> list[fx.Node]:
        """Return `blocks` - 1 of the candidates, in order, at which blocks end whose largest is as small as it can be.

        Args:
            among: the candidates that may be taken.
            blocks: K, at least 2.

        Returns:
            The nodes; none if no chain of them is long enough.
        """
        taken = np.array([k for k, node in enumerate(self.candidates) if node in among], dtype=np.int64)
        if not len(taken):
            return []
        before, impossible = self._before[taken], np.iinfo(np.int64).max
        follows = self._needs[np.ix_(taken, taken)].T & ~np.eye(len(taken), dtype=bool)  # [a, b]: b needs a
        largest, previous = before, list[np.ndarray]()
        for _ in range(blocks - 2):
            costs = np.maximum(largest[:, None], before[None] - before[:, None])
            costs[~follows] = impossible
            previous.append(costs.argmin(axis=0))
            largest = costs.min(axis=0)
        at = int(np.maximum(largest, self._total - before).argmin())
        if largest[at] == impossible:
            return []
        chain = [at]
        for sources in reversed(previous):
            chain.append(int(sources[chain[-1]]))
        return [self.candidates[taken[k]] for k in reversed(chain)]

    def beside(self, chain: Sequence[fx.Node]) -> set[fx.Node]:
        """Return the candidates that need, or are needed by, each node of a chain, itself included."""
        places = [self._index[node] for node in chain]
        fits = (self._needs[:, places] | self._needs[places].T).all(axis=1)
        return {node for node, fit in zip(self.candidates, fits, strict=True) if fit}


def _bits(number: int, count: int) -> np.ndarray:
    """Return the bits of a number as booleans, the lowest first."""
    raw = np.frombuffer(number.to_bytes((count + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").astype(bool)
