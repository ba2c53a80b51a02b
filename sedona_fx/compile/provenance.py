"""From a decision to the plan that is saved with the net."""

from __future__ import annotations

import platform

import torch

from sedona_fx.compile.request import Request
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.analysed import Analysed
from sedona_fx.net.signature import described
from sedona_fx.passes.cuts import base_layers
from sedona_fx.plan import Plan
from sedona_fx.search.problem.problem import Decision


def plan_of(request: Request, analysed: Analysed, decision: Decision) -> Plan:
    """Write down a decision and everything that a net needs to be made of it again.

    What depends on this model and this run (capture, seed, inputs, base layers) is always written anew, also where an
    older plan is applied. The provenance is the decision's own: an applied plan keeps its history.
    """
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return Plan(
        cuts=tuple(decision.cuts),
        heads=tuple(head_name(spec) if spec is not None else None for spec in decision.heads),
        devices=request.devices,
        output=request.output,
        root=request.root,
        model=type(request.model).__name__,
        base_layers=tuple(base_layers(analysed.train)),
        inputs=described(request.example),
        seed=request.seed,
        capture=analysed.capture,
        block_seconds=decision.block_seconds,
        provenance={**versions, **decision.provenance},
    )
