"""The passes, one a file, in the order they run.

``trace``, ``annotate``, ``explicit_writes``, ``crossings``, ``cuts``, ``relax``, ``prune``, ``lower``, ``partition``,
and ``strip`` back to the graph that was traced.
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
    """ANALYSED -> LOWERED for a decision: cut name -> its one head, or none."""
    return lower(prune(relax(gm, heads), dict.fromkeys(heads, 0)), devices)


__all__ = [
    "BlockGraph",
    "Memo",
    "Phase",
    "Traced",
    "annotate",
    "base_layers",
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
