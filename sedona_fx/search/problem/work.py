"""The work of candidate heads, relative to a plain training step of the net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sedona_fx.ir.graph import TensorSpec, info
from sedona_fx.search.problem.problem import Problem, candidate_cost


@dataclass(frozen=True)
class RelaxedWork:
    """Work of one step of the relaxed net, in any unit that all fields share.

    Attributes:
        net: of the net without heads, on a training batch.
        heads: of all heads, on a training batch.
        validation: of the net on a validation batch. None: as on a training batch.
        sampled: share of the heads that an ordinary relaxed step runs, 0 to 1.
    """

    net: float
    heads: float
    validation: float | None = None
    sampled: float = 1.0


HEAD_OVERHEAD = 2.0
"""Work of a head per byte or FLOP, relative to the net's: a head is many small operators."""


def work(problem: Problem, places: Sequence[str]) -> RelaxedWork:
    """Estimate the work of all candidate heads relative to a plain training step of the net, which counts as 1.

    The ratio is that of the FLOPs or that of the activation bytes, whichever is larger, times :data:`HEAD_OVERHEAD`. By
    FLOPs alone, the candidates of a quarter-width VGG-19 would cost half a training step; they take 3.3, because memory
    bandwidth bounds them. The ratio of bytes says 3.0 there. On smaller batches and images heads take up to 2.3 times
    what the ratio says (ResNet-32, batch 32); twice the ratio is a safe estimate where it matters, for real nets.

    Args:
        problem: the net and its candidate heads.
        places: the cut points whose candidates count.
    """
    records = [info(node) for node in problem.train.graph.nodes]
    costs = [
        candidate_cost(problem, place, problem.node(place), head)
        for place in places
        for head in range(len(problem.candidates[place]))
    ]
    flops_ratio = sum(cost.flops for cost in costs) / max(1, sum(record.flops for record in records))
    # Saved bytes say little where most of the net is frozen; the activations are computed all the same.
    saved_bytes = sum(sum(record.saved.values()) for record in records)
    computed_bytes = sum(r.value.bytes for r in records if r.flops and isinstance(r.value, TensorSpec))
    bytes_ratio = sum(cost.activation_bytes for cost in costs) / max(1, saved_bytes, computed_bytes)
    return RelaxedWork(net=1.0, heads=HEAD_OVERHEAD * max(flops_ratio, bytes_ratio))
