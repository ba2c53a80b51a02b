"""The stretches of a net between some of its cut points, each as a block of its own without a head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.passes import lower_at, partition


def cut_into_stretches(gm: fx.GraphModule, ends: Iterable[fx.Node]) -> list[BlockGraph]:
    """Cut an ANALYSED graph at some of its cut points.

    Args:
        gm: the train or the eval graph; it is left unchanged, and its modules are shared with the result.
        ends: the train graph's nodes of the cut points.

    Returns:
        The stretches in order, one more than there are ends.
    """
    return partition(lower_at(gm, {str(info(end).cut): [] for end in ends}))
