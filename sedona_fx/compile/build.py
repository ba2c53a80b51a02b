"""ANALYSED graphs and a plan -> net: new heads, LOWERED graphs, block graphs, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sedona_fx import passes
from sedona_fx.capture.keep import keep_state
from sedona_fx.compile.analyse import gc_paused
from sedona_fx.compile.head_reach import warn_of_missed
from sedona_fx.compile.request import Request
from sedona_fx.compile.uneven import why_uneven
from sedona_fx.data.sizes import resized
from sedona_fx.errors import HeadError, first_line
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.dtypes import make_head
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.cost import block_costs, cost_of_head
from sedona_fx.ir.graph import HEADS
from sedona_fx.ir.modules import first_float_parameter, keep_modes
from sedona_fx.ir.outputs import pick
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
    if analysed.capture.free_sizes and any(head is not None for head in modules.values()):
        placeless = lowered[True] if devices is None else passes.lower_at(analysed.train, heads_by_cut)
        analysed, plan = _with_sizes_of_heads(request, analysed, placeless, plan)
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
    costs = block_costs(analysed.train, ends, head_costs)
    return Net(
        NetParts(
            model=request.model,
            analysed=analysed,
            lowered=lowered,
            blocks=blocks,
            heads=list(modules.values()),
            costs=costs,
            uneven=why_uneven(request, analysed, plan.cuts, costs, head_costs),
            plan=plan,
            loss=request.loss,
            objectives=request.objectives,
        )
    )


def _with_sizes_of_heads(
    request: Request, analysed: Analysed, lowered: fx.GraphModule, plan: Plan
) -> tuple[Analysed, Plan]:
    """Return the record and the plan with all sizes fixed if a head gives something else than the model at others.

    Raises:
        HeadError: it does, at sizes that the user wants free.
    """
    fixed = replace(analysed.capture, free_sizes=())
    few = resized(analysed.example.first(2).kwargs, analysed.capture.free_sizes)
    fault = "no other size is possible" if few is None else _fault_of_heads(request, analysed, lowered, few)
    if not fault:
        return analysed, plan
    if request.dynamic:
        raise HeadError(
            f"sizes cannot be free: {fault}, at other sizes than those of the first batch. Leave out dynamic=, or give "
            "heads that follow the sizes."
        )
    return replace(analysed, capture=fixed), replace(plan, capture=fixed)


def _fault_of_heads(request: Request, analysed: Analysed, lowered: fx.GraphModule, few: Mapping[str, Any]) -> str:
    """Return what is wrong with the output of a head for these inputs; empty if nothing is."""
    inputs = [few[str(node.target)] for node in lowered.graph.nodes if node.op == "placeholder"]
    with keep_modes(request.model, lowered), keep_state(request.model), keep_state(lowered), torch.no_grad():
        try:
            *locals_, output = lowered.train()(*inputs)
        except Exception as error:  # of a head of the user's, of any kind
            return f"a head does not run ({first_line(error)})"
    shape = pick(output, analysed.output.key).shape
    for index, (local, objective) in enumerate(zip(locals_, request.objectives, strict=True)):
        if objective is None and local is not None and local.shape != shape:
            return f"the head of block {index} gives {tuple(local.shape)} where the model gives {tuple(shape)}"
    return ""


def _build_heads(
    model: nn.Module, analysed: Analysed, heads: Sequence[HeadSpec | None], plan: Plan
) -> dict[str, nn.Module | None]:
    """Return cut -> head, in the dtype of the activation, on the device and in the mode of the model."""
    parameter = first_float_parameter(analysed.train)  # of those in use: others may be of another dtype
    like = parameter if parameter is not None else torch.empty(())
    modules: dict[str, nn.Module | None] = {}
    with seeded_init(plan.seed):
        for cut, spec in zip(plan.cuts, heads, strict=True):
            head = make_head(spec, analysed.contexts[cut], like) if spec is not None else None
            modules[cut] = head.train(model.training) if head is not None else None
    return modules
