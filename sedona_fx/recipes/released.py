"""The decisions that SEDONA's authors released, as plans: learned logits, decoded for one of their nets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import HeadError, PlanError, shape_text
from sedona_fx.heads.registry import head_names
from sedona_fx.net.signature import described
from sedona_fx.plan import Plan
from sedona_fx.recipes.transfer import analysed, check_heads
from sedona_fx.search.sedona.decode import decode

Logits = Sequence[float] | Tensor

_WIDE_FROM = 32  # channels of the first convolution: between 16 (quarter width) and 64 (full), by factors


def released_plan(
    alpha: Sequence[Sequence[float]] | Tensor,
    beta: Sequence[Logits] | Tensor,
    model: nn.Module,
    blocks: int = 4,
    data: Any = None,
    heads: str | None = None,
) -> Plan:
    """Return a decision that SEDONA's authors released as a plan: their variables, decoded for one of their nets.

    Args:
        alpha: (B-1, 2) logits: isolate, let through.
        beta: (B-1, 4) logits of the heads of depth 1 to 4.
        model: a net of :mod:`sedona_fx.models` with B base layers, of any width.
        blocks: K, from 1 to B.
        data: one (inputs, target) pair or an iterable of such, to check that the heads fit; None: unchecked.
        heads: the heads' name without depth. None: by the width of the first convolution, as the paper has it:
            ``"sedona-wide"`` (2048 features) from 32 channels on, ``"sedona"`` (512) below: quarter-width nets have 16,
            those of full width 64.

    Raises:
        PlanError: the variables are for another number of base layers, or are no such variables.
        HeadError: there is no such head, or one does not fit.
    """
    name = type(model).__name__
    layers = getattr(model, "base_layers", None)
    if not layers:
        raise PlanError(
            f"{name} does not declare its base layers, of which the released variables number the first B-1: take a "
            "net of sedona_fx.models."
        )
    isolate = _logits("alpha", alpha)
    if isolate.dim() != 2 or isolate.shape[1] != 2:
        raise PlanError(f"alpha should be (B-1, 2), isolate and let through; it is {shape_text(isolate.shape)}.")
    if not isinstance(beta, Iterable):
        raise PlanError(
            f"beta should hold a row of numbers for each of the {len(isolate)} rows of alpha, not "
            f"{type(beta).__name__}."
        )
    weights = [_logits("beta", row) for row in beta]
    if len(weights) != len(isolate) or any(row.dim() != 1 or not len(row) for row in weights):
        raise PlanError(f"beta should be (B-1, heads) with the B-1 = {len(isolate)} rows of alpha; it has {len(beta)}.")
    if len(layers) != len(isolate) + 1:
        raise PlanError(
            f"the variables are for {len(isolate) + 1} base layers, and {name} has {len(layers)}: take the net they "
            "were learned on, in any width, and transfer the plan from there (sedona_fx.transfer_plan)."
        )
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= len(layers):
        raise PlanError(f"blocks={blocks!r}: {len(layers)} base layers make 1 to {len(layers)} blocks.")
    prefix = heads if heads is not None else _prefix(model)
    at, depths = decode(isolate, weights, blocks)
    chosen = [f"{prefix}-{depth + 1}" for depth in depths]
    if unknown := [head for head in chosen if head not in head_names()]:
        raise HeadError(
            f"there is no head named {unknown[0]!r}: heads={prefix!r} is put before '-1', '-2', ..., one a column of "
            "beta. Built-in: 'sedona', 'sedona-wide', 'sedona-basic'."
        )
    plan = Plan(
        cuts=tuple(layers[k] for k in at),
        heads=tuple(chosen),
        model=name,
        base_layers=tuple(layers[:-1]),
        provenance={
            "search": "released",
            "places": list(layers[:-1]),
            "alpha": isolate.tolist(),
            "beta": [row.tolist() for row in weights],
        },
    )
    if data is None:
        return plan
    traced, example = analysed(plan, model, data, (), named=plan.cuts)
    check_heads(plan, plan.cuts, traced)
    return dataclasses.replace(plan, inputs=described(example))


def _logits(which: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).detach()
    except (TypeError, ValueError) as error:
        raise PlanError(f"{which} should hold rows of numbers, all of one length: {error}.") from None
    if not tensor.isfinite().all():
        raise PlanError(f"{which} holds values that are not finite.")
    return tensor


def _prefix(model: nn.Module) -> str:
    """Choose the heads by the net's width; the paper makes them four times wider with the nets."""
    first = next((m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 0)
    return "sedona-wide" if first >= _WIDE_FROM else "sedona"
