"""ANALYSED graphs and a plan -> net: fresh heads, LOWERED graphs, blocks, costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sedona_fx import passes
from sedona_fx.compile.analyse import uncollected
from sedona_fx.compile.request import Request
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.cost import block_costs, cost_of_head
from sedona_fx.net.net import Net
from sedona_fx.net.parts import NetParts
from sedona_fx.passes.cuts import resolve
from sedona_fx.plan import Plan
from sedona_fx.rng import seeded_init


@uncollected()
def build(request: Request, analysed: Analysed, heads: Sequence[HeadSpec | None], plan: Plan) -> Net:
    """ANALYSED -> RELAXED -> PRUNED -> LOWERED -> blocks, in both modes.

    Args:
        request: the model, the loss and the objectives.
        analysed: its graphs.
        heads: for each cut of the plan a name or a factory, or None for no head; drawn from the plan's seed.
        plan: what was decided.
    """
    built = _build_heads(request.model, analysed, heads, plan)
    devices = [torch.device(name) for name in plan.devices] if plan.devices is not None else None
    placed = {cut: [head] if head is not None else [] for cut, head in built.items()}
    lowered = {True: passes.lower_at(analysed.train, placed, devices)}
    same = analysed.eval is analysed.train
    lowered[False] = lowered[True] if same else passes.lower_at(analysed.eval, placed, devices)
    blocks = {True: passes.partition(lowered[True])}
    blocks[False] = blocks[True] if same else passes.partition(lowered[False])
    cut_nodes = resolve(analysed.train.graph)
    ends = [cut_nodes[cut] for cut in plan.cuts]
    head_costs = [
        cost_of_head(analysed.head_costs, spec, analysed.contexts[cut], end) if spec is not None else None
        for spec, cut, end in zip(heads, plan.cuts, ends, strict=True)
    ]
    return Net(
        NetParts(
            model=request.model,
            analysed=analysed,
            lowered=lowered,
            blocks=blocks,
            heads=list(built.values()),
            costs=block_costs(analysed.train, ends, head_costs),
            plan=plan,
            loss=request.loss,
            objectives=request.objectives,
        )
    )


def _build_heads(
    model: nn.Module, analysed: Analysed, heads: Sequence[HeadSpec | None], plan: Plan
) -> dict[str, nn.Module | None]:
    """Return the head of every cut, in the model's dtype, mode and on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    built: dict[str, nn.Module | None] = {}
    with seeded_init(plan.seed):
        for cut, spec in zip(plan.cuts, heads, strict=True):
            head = build_head(spec, analysed.contexts[cut]) if spec is not None else None
            built[cut] = head.to(like.device, like.dtype).train(model.training) if head is not None else None
    return built
