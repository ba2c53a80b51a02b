"""Promise 4 as a check: in float64, every block's gradient is that of the untouched model, to 1e-12 of its norm."""

from __future__ import annotations

from typing import Any

import torch
from catalogue import Entry
from catalogue.entry import perturb
from hooked import by_block, net_gradients, reference_gradients, tensor_modules
from promises import decoupled, ready
from states import silence
from torch import Tensor, nn
from trees import doubled

import sedona_fx
from sedona_fx.ir.graph import cut_points, info

TOLERANCE = 1e-12
SEED = 11


def gradients(entry: Entry, net: sedona_fx.Net) -> str:
    """Say where a block's gradient is wrong, or ''.

    The model has no dropout here, as the draws of blocks are their own; and the cuts stand behind modules that run once
    and return one tensor, where a hook of the reference can see it.

    Args:
        entry: the row.
        net: the row's net, whose cuts are taken where they are such modules.
    """
    model, inputs, target = ready(entry)
    silence(model)
    model, inputs, target = model.double(), doubled(inputs), doubled(target)
    cuts = _cuts(model, inputs, net)
    if not cuts:
        return "no cut stands behind a module that returns one tensor: not compared"
    made = decoupled(entry, model, inputs, target, cuts=cuts, seed=SEED)
    perturb(made.heads)
    losses, wanted = reference_gradients(model, made, inputs, target, entry.criterion)
    result = made.backward(inputs, target)
    for index, (ours, theirs) in enumerate(zip(result.losses, losses, strict=True)):
        if not (ours - theirs).abs() <= TOLERANCE * theirs.abs():
            return f"the loss of block {index} is {ours.item()!r}, in the model {theirs.item()!r}"
    return _compare(made, net_gradients(made), wanted)


def _cuts(model: nn.Module, inputs: Any, net: sedona_fx.Net) -> list[str]:
    """Return the net's own cuts, those that no hook can see replaced by the next legal ones that a hook can.

    None is nearer the input than the net's first: there may be nothing a head could do (the encoder of speech).
    """
    legal = list(dict.fromkeys(str(info(node).cut) for node in cut_points(net.graph_module.graph)))
    seen = set(tensor_modules(model, inputs, legal))
    first, chosen = min((legal.index(cut) for cut in net.plan.cuts), default=0), set[int]()
    for cut in net.plan.cuts:
        wanted = legal.index(cut)
        left = [at for at, path in enumerate(legal) if at >= first and path in seen and at not in chosen]
        if left:
            chosen.add(min(left, key=lambda at: (at < wanted, abs(at - wanted))))
    return [legal[at] for at in sorted(chosen)]


def _compare(net: sedona_fx.Net, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    if missing := sorted(wanted.keys() ^ found.keys()):
        return f"{missing[0]} has a gradient {'in the model only' if missing[0] in wanted else 'in the net only'}"
    for index, expected in enumerate(by_block(net, wanted)):
        if not expected:
            return f"block {index} has no gradient at all"
        reference = torch.cat([value.flatten() for value in expected.values()])
        difference = torch.cat([found[name].flatten() for name in expected]) - reference
        if not reference.norm() > 1e-6:
            return f"block {index} has a gradient of norm {reference.norm():.1e}: nothing is shown"
        if not difference.norm() <= TOLERANCE * reference.norm():
            return f"the gradient of block {index} is off by {difference.norm() / reference.norm():.1e} of its norm"
    return ""
