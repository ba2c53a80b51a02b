"""FLOPs, parameters and activation bytes of a stretch of the graph, a block or a head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from sedona_fx.fake.meter import Meter
from sedona_fx.heads.context import HeadContext, HeadSpec
from sedona_fx.heads.dtypes import converted
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.flow import block_of
from sedona_fx.ir.graph import TensorSpec, info
from sedona_fx.rng import seeded


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a net for one batch.

    Attributes:
        flops: of the forward pass (two per multiply-add).
        parameters: number of parameter elements.
        activation_bytes: bytes that autograd keeps for the backward pass.
        uncounted: names of the operators that read weights and have no formula. `flops` holds an estimate for them: as
            many for a byte read or written as the operators of the net that have one.
    """

    flops: int = 0
    parameters: int = 0
    activation_bytes: int = 0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            parameters=self.parameters + other.parameters,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            uncounted=tuple(dict.fromkeys((*self.uncounted, *other.uncounted))),
        )


def head_cost(make: Callable[[], nn.Module], activation: TensorSpec) -> Cost:
    """Return the cost of a head on an activation, without allocating either.

    Args:
        make: builds the head; called with ``meta`` as the default device.
        activation: what the head reads. Its own bytes are not counted.
    """
    with torch.device("meta"), Meter():
        head = make()
    sample = torch.empty(activation.shape, dtype=activation.dtype, device="meta", requires_grad=True)
    meter = Meter([*head.parameters(), *head.buffers(), sample])
    meter.watch_weights(parameter for parameter in head.parameters() if parameter.dim() >= 2)
    dtype = activation.dtype.to_real() if activation.dtype.is_complex else activation.dtype
    with seeded(torch.device("cpu"), 0), torch.enable_grad(), meter.measuring():  # it may draw
        converted(head, sample.device, dtype)(sample)
    return Cost(
        flops=meter.work.estimated(meter.work.flops_a_byte),
        parameters=sum(p.numel() for p in head.parameters()),
        activation_bytes=sum(meter.saved.values()),
        uncounted=tuple(meter.work.uncounted),
    )


def stretch_costs(gm: fx.GraphModule, ends: Sequence[fx.Node]) -> tuple[list[Cost], list[int]]:
    """Return the cost of each stretch between consecutive cut points, and the bytes that adjacent stretches share.

    Where parameters are frozen, a stretch is taken as a block of its own: what it runs before its first parameter that
    requires a gradient keeps nothing for backward.

    Args:
        gm: an ANALYSED graph.
        ends: the n cut points, in order.

    Returns:
        n+1 costs, and n numbers of bytes: what stretches i and i+1 both keep (the boundary activation). A block that
        holds both stretches counts these bytes once.
    """
    blocks = block_of(gm.graph, ends)
    reach = gradient_reach(gm.graph, blocks)
    elements = {name: parameter.numel() for name, parameter in gm.named_parameters()}
    flops = [0] * (len(ends) + 1)
    saved: list[dict[int, int]] = [{} for _ in flops]  # storage -> bytes
    names: list[set[str]] = [set() for _ in flops]
    uncounted: list[dict[str, None]] = [{} for _ in flops]
    for node, block in blocks.items():
        record = info(node)
        flops[block] += record.flops
        if reach.get(node, block) == block:
            saved[block].update(record.saved)
        names[block].update(record.parameters)
        uncounted[block].update(dict.fromkeys(record.work.uncounted))
    costs = [
        Cost(flops[k], sum(elements.get(name, 0) for name in names[k]), sum(saved[k].values()), tuple(uncounted[k]))
        for k in range(len(flops))
    ]
    shared = [
        sum(first[storage] for storage in first.keys() & second.keys()) for first, second in itertools.pairwise(saved)
    ]
    return costs, shared


def gradient_reach(graph: fx.Graph, stretches: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Return which nodes run without a graph because parameters are frozen, depending on where their block begins.

    What enters a block is detached. So a node has a graph if a parameter that requires a gradient comes before it in
    its own block, and frozen parameters at the beginning of a block run as fast as under ``torch.no_grad()``.

    Args:
        graph: annotated.
        stretches: the stretch of each node, as :func:`~sedona_fx.ir.flow.block_of` gives it.

    Returns:
        Node -> the last stretch that its block may begin with so that the node has a graph; -1 if it never has one.
        Nodes that would not have one either if all parameters were trained, and those that always have one, are left
        out.
    """
    trained, reading = dict[fx.Node, int](), dict[fx.Node, int]()  # the last stretch with such a parameter before
    reach = {}
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        records = [info(node), *(info(source) for source in node.all_input_nodes if source.op == "get_attr")]
        here = stretches[node]
        for latest, own in ((trained, any(r.trained for r in records)), (reading, any(r.parameters for r in records))):
            before = max((latest[source] for source in sources), default=-1)
            latest[node] = -1 if not info(node).depends else here if own else before
        if trained[node] < reading[node]:
            reach[node] = trained[node]
    return reach


def block_costs(gm: fx.GraphModule, ends: Sequence[fx.Node], heads: Sequence[Cost | None]) -> list[Cost]:
    """Return the cost of each block, its head included.

    Args:
        gm: an ANALYSED graph.
        ends: the cut points, in order.
        heads: the cost of the head at each cut point, or None without a head.
    """
    stretches, _ = stretch_costs(gm, ends)
    return [cost + head if head is not None else cost for cost, head in zip(stretches, [*heads, None], strict=True)]


def cost_of_head(costs: dict[Hashable, Cost], spec: HeadSpec, context: HeadContext, node: fx.Node) -> Cost:
    """Return the cost of a head on the value of a node, computed once for all cut points of one shape.

    Args:
        costs: the costs known so far; a new one is added.
        spec: the head.
        context: what the head is built for.
        node: a cut point.
    """
    value = info(node).value
    # A factory of the user's need not be hashable. It lives as long as the call in which costs are known.
    key = (spec if isinstance(spec, str) else id(spec), value, replace(context, place=""))
    if key not in costs:
        costs[key] = head_cost(lambda: build_head(spec, context), value)
    return costs[key]
