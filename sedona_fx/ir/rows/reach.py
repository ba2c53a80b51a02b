"""Which parameters a gradient reaches that enters a value in some of its rows alone (one token, the last step).

The class token of a transformer knows nothing of the image before the first attention: a head that reads it alone there
sees a constant, and the patch embedding gets a gradient of exactly zero. So the rows that are read are followed back
through the graph, operation by operation: most keep rows apart, attention reads all of them, a concatenation takes
them from different places. Of an operation that is not known here nothing is claimed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

from torch import fx

from sedona_fx.ir.graph import info
from sedona_fx.ir.rows.need import ALL, NOTHING, Need, joined, rows
from sedona_fx.ir.rows.rules import own_missed, sources_of


def missed_parameters(
    gm: fx.GraphModule, end: fx.Node, dim: int, places: Collection[int], *, unknown_reads_all: bool = False
) -> Iterator[str]:
    """Yield the parameters that a gradient does not reach which enters the value of a node in some rows.

    Args:
        gm: annotated.
        end: the node.
        dim: the dimension of the rows.
        places: of the rows, not negative.
        unknown_reads_all: what to take of an operation that is not known: that each row of what it gives depends on all
            that it reads, so that only what is certainly missed is yielded; else that it depends on nothing, so that
            what is not yielded is certainly reached.
    """
    unknown: Need = ALL if unknown_reads_all else NOTHING
    needs: dict[fx.Node, Need] = {end: rows(dim, places)}
    waiting = [(-info(end).order, end)]  # later nodes first: all readers of a node come before it
    partial = {end}  # those that wait and are not needed in full
    while partial:  # what lies behind nodes that are needed in full is reached, as it is by every gradient
        _, node = heapq.heappop(waiting)
        need = needs[node]
        partial.discard(node)
        yield from own_missed(gm, node, need, unknown)
        for source, wanted in sources_of(gm, node, need, unknown).items():
            if not info(source).depends:
                continue
            if source not in needs:
                heapq.heappush(waiting, (-info(source).order, source))
            needs[source] = joined(needs.get(source, NOTHING), wanted)
            (partial.discard if needs[source] is ALL else partial.add)(source)


def reaches_all(gm: fx.GraphModule, end: fx.Node, dim: int, place: int | None) -> bool:
    """Whether the gradient of one row of a value is sure to reach every parameter that the value depends on.

    Args:
        gm: annotated.
        end: the node of the value.
        dim: the dimension of the rows.
        place: of the row; counted from the end if negative. None: all rows.
    """
    if place is None:
        return True
    places = {place % info(end).value.shape[dim]}
    return next(missed_parameters(gm, end, dim, places), None) is None
