"""The passes, one per file: plain functions that take a graph and return one.

A graph goes through phases (:class:`~sedona_fx.ir.spec.Phase`). Each pass takes a graph of one phase and returns one of
the same or the next phase; the result is checked against the specification of its phase, always
(:func:`~sedona_fx.ir.spec.verify`). In the order in which they run:

=================== ============================ ======================================================================
pass                phases                       what for
=================== ============================ ======================================================================
``trace``           model -> TRACED              record the forward, in train mode and in eval mode (with ``retype``)
``annotate``        TRACED -> TRACED             what every node makes, keeps, overwrites and costs (with ``fake_run``)
``explicit_writes`` TRACED -> TRACED             in-place writes become edges
``crossings``       TRACED -> TRACED             where a block can end, and how many activations cross there
``batch``           TRACED -> TRACED             where activations hold the batch (with ``batch_doubt``, ``row_order``)
``cuts``            TRACED -> ANALYSED           which of these places are offered, under which names (with ``places``)
``relax``           ANALYSED -> RELAXED          a split point at each candidate cut: a search learns which to make
``prune``           RELAXED -> PRUNED            only the chosen split points are left, each with one head
``lower``           PRUNED -> LOWERED            split points become real boundaries: detach, head, device move
``partition``       LOWERED, RELAXED -> BLOCK    one graph per block (``block_variants`` has other forms of these)
``strip``           LOWERED -> TRACED            back to the graph that was traced
=================== ============================ ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from sedona_fx.fake.memo import Memo
from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes.annotate import annotate
from sedona_fx.passes.batch import batch
from sedona_fx.passes.crossings import crossings
from sedona_fx.passes.cuts import base_layers, cuts
from sedona_fx.passes.explicit_writes import explicit_writes
from sedona_fx.passes.lower import lower
from sedona_fx.passes.partition import partition
from sedona_fx.passes.prune import prune
from sedona_fx.passes.relax import relax
from sedona_fx.passes.strip import strip
from sedona_fx.passes.trace import Traced, trace


def lower_at(
    gm: fx.GraphModule, heads: Mapping[str, Sequence[nn.Module]], devices: Sequence[torch.device] | None = None
) -> fx.GraphModule:
    """ANALYSED -> LOWERED for cuts that are decided: ``relax``, ``prune`` and ``lower`` in one call.

    Args:
        gm: it is not changed. Modules are shared.
        heads: cut name -> its one head, or an empty sequence for a cut without one.
        devices: one device per block, or None to move nothing.
    """
    return lower(prune(relax(gm, heads), dict.fromkeys(heads, 0)), devices)


__all__ = [
    "BlockGraph",
    "Memo",
    "Phase",
    "Traced",
    "annotate",
    "base_layers",
    "batch",
    "crossings",
    "cuts",
    "explicit_writes",
    "graph_pass",
    "info",
    "lower",
    "lower_at",
    "partition",
    "prune",
    "relax",
    "strip",
    "trace",
    "verify",
]
