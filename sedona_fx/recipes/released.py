"""The decisions that SEDONA's authors released, as plans: their learned logits, decoded for one of their nets."""

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
from sedona_fx.recipes.transfer import analyse_for_plan, check_heads
from sedona_fx.search.sedona.decode import decode

Logits = Sequence[float] | Tensor

_WIDE_FROM = 32  # channels of the first convolution: the geometric mean of 16 (quarter width) and 64 (full width)


def released_plan(
    alpha: Sequence[Sequence[float]] | Tensor,
    beta: Sequence[Logits] | Tensor,
    model: nn.Module,
    blocks: int = 4,
    data: Any = None,
    heads: str | None = None,
) -> Plan:
    """Return a decision that SEDONA's authors released as a plan, decoded from their variables for one of their nets.

    The paper is Pyeon, Moon, Hahn, Kim, ICLR 2021. B is the number of base layers.

    Args:
        alpha: (B-1, 2) logits of the cuts: isolate, let through.
        beta: (B-1, 4) logits of the heads of depth 1 to 4.
        model: a net of :mod:`sedona_fx.models` with B base layers, of any width.
        blocks: number of blocks K, from 1 to B.
        data: one (inputs, target) pair or an iterable of pairs, to check that the heads fit; None: no check.
        heads: name of the heads without the depth. None: by the width of the first convolution, as in the paper:
            ``"sedona-wide"`` (2048 features) from 32 channels on, ``"sedona"`` (512 features) below that. Quarter-width
            nets have 16 channels, those of full width 64.

    Returns:
        The plan; with `data`, it describes the inputs too.

    Raises:
        PlanError: the variables are for another number of base layers, or have wrong shapes or values.
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
        raise PlanError(
            f"beta should be (B-1, heads) with the B-1 = {len(isolate)} rows of alpha; it has {len(weights)}."
        )
    if len(layers) != len(isolate) + 1:
        raise PlanError(
            f"the variables are for {len(isolate) + 1} base layers, and {name} has {len(layers)}: take the net they "
            "were learned on, in any width, and transfer the plan from there (sedona_fx.transfer_plan)."
        )
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= len(layers):
        raise PlanError(f"blocks={blocks!r}: {len(layers)} base layers make 1 to {len(layers)} blocks.")
    prefix = heads if heads is not None else _prefix(model)
    cuts, depths = decode(isolate, weights, blocks)
    names = [f"{prefix}-{depth + 1}" for depth in depths]
    if unknown := [head for head in names if head not in head_names()]:
        raise HeadError(
            f"there is no head named {unknown[0]!r}: heads={prefix!r} is put before '-1', '-2', ..., one a column of "
            "beta. Built-in: 'sedona', 'sedona-wide', 'sedona-basic'."
        )
    plan = Plan(
        cuts=tuple(layers[k] for k in cuts),
        heads=tuple(names),
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
    traced, example = analyse_for_plan(plan, model, data, (), named=plan.cuts)
    check_heads(plan, plan.cuts, traced)
    return dataclasses.replace(plan, inputs=described(example))


def _logits(which: str, values: Any) -> Tensor:
    """Return values as a float64 tensor, or raise :class:`PlanError` if they are not finite numbers of one shape."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).detach()
    except (TypeError, ValueError) as error:
        raise PlanError(f"{which} should hold rows of numbers, all of one length: {error}.") from None
    if not tensor.isfinite().all():
        raise PlanError(f"{which} holds values that are not finite. Take the logits of a search that did not diverge.")
    return tensor


def _prefix(model: nn.Module) -> str:
    """Return the name of the heads for the width of a net: in the paper, heads grow with the nets, by a factor of 4."""
    first = next((m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 0)
    return "sedona-wide" if first >= _WIDE_FROM else "sedona"
