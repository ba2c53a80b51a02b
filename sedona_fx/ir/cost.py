"""What things cost: FLOPs, parameters and activation bytes of a node, a block or a head; seconds of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from sedona_fx.fake.meter import Meter
from sedona_fx.heads.context import HeadContext, HeadSpec
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import TensorSpec, info


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a net for one batch.

    Attributes:
        flops: of the forward pass, counted by PyTorch's formulas (two a multiply-add).
        parameters: number of parameter elements.
        activation_bytes: bytes that autograd keeps for the backward pass.
    """

    flops: int = 0
    parameters: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.parameters + other.parameters,
            self.activation_bytes + other.activation_bytes,
        )


def head_cost(make: Callable[[], nn.Module], activation: TensorSpec) -> Cost:
    """Return the cost of a head on an activation without allocating it; the activation itself is not counted."""
    with torch.device("meta"), Meter():
        head = make()
    sample = torch.empty(activation.shape, dtype=activation.dtype, device="meta", requires_grad=True)
    meter = Meter([*head.parameters(), *head.buffers(), sample])
    with torch.enable_grad(), meter.measuring():
        head.to(activation.dtype)(sample)
    return Cost(meter.flops, sum(p.numel() for p in head.parameters()), sum(meter.saved.values()))


def stretch_costs(gm: fx.GraphModule, ends: Sequence[fx.Node]) -> tuple[list[Cost], list[int]]:
    """Return the cost of each stretch between consecutive cut points, and the bytes that neighbours share.

    Args:
        gm: an ANALYSED graph.
        ends: the n cut points, in order.

    Returns:
        n+1 costs, and n numbers: bytes that stretch i and stretch i+1 both keep (the boundary activation), which a
        block holding both counts once.
    """
    blocks = block_of(gm.graph, ends)
    sizes = {name: parameter.numel() for name, parameter in gm.named_parameters()}
    flops = [0] * (len(ends) + 1)
    kept: list[dict[int, int]] = [{} for _ in flops]
    names: list[set[str]] = [set() for _ in flops]
    for node, block in blocks.items():
        record = info(node)
        flops[block] += record.flops
        kept[block].update(record.saved)
        names[block].update(record.parameters)
    costs = [
        Cost(f, sum(sizes.get(name, 0) for name in used), sum(saved.values()))
        for f, used, saved in zip(flops, names, kept, strict=True)
    ]
    shared = [sum(a[s] for s in a.keys() & b.keys()) for a, b in itertools.pairwise(kept)]
    return costs, shared


def block_costs(gm: fx.GraphModule, ends: Sequence[fx.Node], heads: Sequence[Cost | None]) -> list[Cost]:
    """Return the cost of each block, its head included."""
    stretches, _ = stretch_costs(gm, ends)
    return [cost + head if head is not None else cost for cost, head in zip(stretches, [*heads, None], strict=True)]


def cost_of_head(known: dict[Hashable, Cost], spec: HeadSpec, context: HeadContext, node: fx.Node) -> Cost:
    """Return the cost of a head on the value of a node, and note it: a deep net has many cut points of few shapes."""
    value = info(node).value
    key = (spec, value, replace(context, place=""))
    if key not in known:
        known[key] = head_cost(lambda: build_head(spec, context), value)
    return known[key]
