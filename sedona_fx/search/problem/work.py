"""The work of candidate heads, relative to a plain training step of the net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sedona_fx.ir.graph import TensorSpec, info
from sedona_fx.search.problem.problem import Problem, candidate_cost


@dataclass(frozen=True)
class RelaxedWork:
    """Work of one step, in any unit: of the net and of all heads on a training batch, of the net on a validation batch
    (None: as on a training batch). `sampled` is the share of the heads that an ordinary relaxed step runs.
    """

    net: float
    heads: float
    validation: float | None = None
    sampled: float = 1.0


# Work of a head for each byte (or FLOP) of its activations, relative to the net's: heads are many small operators.
HEAD_OVERHEAD = 2.0


def work(problem: Problem, places: Sequence[str]) -> RelaxedWork:
    """Estimate the heads' work against the net's: by FLOPs or by activation bytes, whichever says more.

    By FLOPs alone, the candidates of a quarter-width VGG-19 would cost half a training step; they take 3.3, since what
    they do is bound by memory. The ratio of bytes says 3.0 there. On smaller batches and images they take up to 2.3
    times what it says (ResNet-32, batch 32): twice the ratio is on the safe side where it is about real nets.
    """
    records = [info(node) for node in problem.train.graph.nodes]
    costs = [
        candidate_cost(problem, name, problem.node(name), k)
        for name in places
        for k in range(len(problem.candidates[name]))
    ]
    by_flops = sum(c.flops for c in costs) / max(1, sum(r.flops for r in records))
    # What the net keeps says little where most of it is frozen: it makes its activations all the same.
    kept, made = (
        sum(sum(r.saved.values()) for r in records),
        sum(r.value.bytes for r in records if r.flops and isinstance(r.value, TensorSpec)),
    )
    by_bytes = sum(c.activation_bytes for c in costs) / max(1, kept, made)
    return RelaxedWork(net=1.0, heads=HEAD_OVERHEAD * max(by_flops, by_bytes))
