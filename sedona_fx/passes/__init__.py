"""The passes, one a file, in the order they run.

``trace``, ``annotate``, ``explicit_writes``, ``crossings``, ``cuts``, ``relax``, ``prune``, ``lower``, ``partition``,
and ``strip`` back to the graph that was traced.
"""

from sedona_fx.passes.alias import explicit_writes
from sedona_fx.passes.annotate import annotate
from sedona_fx.passes.crossings import crossings
from sedona_fx.passes.cuts import base_layers, cuts
from sedona_fx.passes.lower import lower
from sedona_fx.passes.memo import Memo
from sedona_fx.passes.partition import BlockGraph, partition
from sedona_fx.passes.prune import prune
from sedona_fx.passes.relax import relax
from sedona_fx.passes.strip import strip
from sedona_fx.passes.trace import Traced, trace

__all__ = [
    "BlockGraph",
    "Memo",
    "Traced",
    "annotate",
    "base_layers",
    "crossings",
    "cuts",
    "explicit_writes",
    "lower",
    "partition",
    "prune",
    "relax",
    "strip",
    "trace",
]
