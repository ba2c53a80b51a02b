"""The plan of a decision: what is saved with the net."""

from __future__ import annotations

import platform

import torch

from sedona_fx.compile.request import Request
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.loss import loss_name
from sedona_fx.ir.outputs import named
from sedona_fx.net.signature import described
from sedona_fx.passes.cuts import base_layers
from sedona_fx.plan import Plan
from sedona_fx.search.problem.problem import Decision


def plan_of(request: Request, analysed: Analysed, decision: Decision) -> Plan:
    """Return the plan of a decision, with everything that is needed to build the net again.

    What depends on this model and this run (capture, seed, losses, inputs, base layers, crossing activations) is always
    recorded anew, even if an older plan is applied. The provenance is the decision's, so an applied plan keeps its
    history.

    Args:
        request: what the user asked for.
        analysed: the model's graphs.
        decision: the cuts and heads.
    """
    objectives = tuple(loss_name(own.loss) if own is not None else None for own in request.objectives)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return Plan(
        cuts=tuple(decision.cuts),
        heads=tuple(head_name(spec) if spec is not None else None for spec in decision.heads),
        devices=request.devices,
        output=named(request.output),
        root=request.root,
        model=type(request.model).__name__,
        base_layers=tuple(base_layers(analysed.train)),
        max_live=analysed.offered.chosen.max_live,
        inputs=described(request.example),
        seed=request.seed,
        loss=loss_name(request.loss),
        local_losses=objectives if any(objectives) else None,
        capture=analysed.capture,
        block_seconds=decision.block_seconds,
        provenance={**versions, **decision.provenance},
    )
