"""ANALYSED graphs and a plan -> net: new heads, LOWERED graphs, block graphs, costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sedona_fx import passes
from sedona_fx.compile.analyse import gc_paused
from sedona_fx.compile.head_reach import warn_of_missed
from sedona_fx.compile.request import Request
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.dtypes import make_head
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.cost import block_costs, cost_of_head
from sedona_fx.ir.graph import HEADS
from sedona_fx.ir.modules import first_float_parameter
from sedona_fx.net.net import Net
from sedona_fx.net.parts import NetParts
from sedona_fx.passes.cuts import resolve
from sedona_fx.plan import Plan
from sedona_fx.rng import seeded_init


@gc_paused()
def build(request: Request, analysed: Analysed, heads: Sequence[HeadSpec | None], plan: Plan) -> Net:
    """ANALYSED -> RELAXED -> PRUNED -> LOWERED -> the graphs of the blocks, in train and in eval mode, and the net.

    Args:
        request: the model, the loss and the objectives.
        analysed: the model's graphs.
        heads: for each cut of the plan the name or factory of its head, or None for no head. Their initial weights are
            drawn from the plan's seed.
        plan: what was decided.

    Raises:
        HeadError: a head does not fit at its cut.
        PlanError: blocks on different devices share a parameter.
    """
    modules = _build_heads(request.model, analysed, heads, plan)
    heads_by_cut = {cut: [head] if head is not None else [] for cut, head in modules.items()}
    devices = [torch.device(name) for name in plan.devices] if plan.devices is not None else None
    lowered = {True: passes.lower_at(analysed.train, heads_by_cut, devices)}
    same = analysed.eval is analysed.train
    lowered[False] = lowered[True] if same else passes.lower_at(analysed.eval, heads_by_cut, devices)
    blocks = {True: passes.partition(lowered[True])}
    blocks[False] = blocks[True] if same else passes.partition(lowered[False])
    cut_nodes = resolve(analysed.train.graph)
    ends = [cut_nodes[cut] for cut in plan.cuts]
    for end, spec, head, block in zip(ends, heads, modules.values(), blocks[True], strict=False):
        if spec is not None and head is not None:
            own = [
                name for name, p in block.module.named_parameters() if p.requires_grad and not name.startswith(HEADS)
            ]
            warn_of_missed(analysed.train, end, spec, head, own)
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
            heads=list(modules.values()),
            costs=block_costs(analysed.train, ends, head_costs),
            plan=plan,
            loss=request.loss,
            objectives=request.objectives,
        )
    )


def _build_heads(
    model: nn.Module, analysed: Analysed, heads: Sequence[HeadSpec | None], plan: Plan
) -> dict[str, nn.Module | None]:
    """Return cut -> head, in the dtype of the activation, on the device and in the mode of the model."""
    parameter = first_float_parameter(model)
    like = parameter if parameter is not None else torch.empty(())
    modules: dict[str, nn.Module | None] = {}
    with seeded_init(plan.seed):
        for cut, spec in zip(plan.cuts, heads, strict=True):
            head = make_head(spec, analysed.contexts[cut], like) if spec is not None else None
            modules[cut] = head.train(model.training) if head is not None else None
    return modules
