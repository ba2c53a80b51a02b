"""A plan found on one net, applied to another: a wider or a deeper one.

SEDONA's authors search on narrow nets and train four times wider ones by the same plan (Pyeon et al., ICLR 2021).
Between nets of different depth there is no published rule; ours is to keep the place of a cut as a fraction of the
base layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from sedona_fx.compile.analyse import Where, analyse
from sedona_fx.compile.request import own
from sedona_fx.data.args import Args
from sedona_fx.data.sources import first_pair, to_device
from sedona_fx.errors import DataError, HeadError, PlanError, did_you_mean
from sedona_fx.heads.registry import build_head, head_names
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import device_of
from sedona_fx.net.signature import described, example_like
from sedona_fx.passes.cuts import base_layers, resolve
from sedona_fx.plan import Plan

By = Literal["path", "fraction"]
log = logging.getLogger(__name__)


def transfer_plan(
    plan: Plan, model: nn.Module, data: Any = None, by: By | None = None, leaf_modules: Collection[str] = ()
) -> Plan:
    """Return a plan for another net: for a wider one, cuts at the same paths; for a deeper one, at the same fractions.

    Heads keep their names, devices their order. ``provenance["transfer"]`` says what became of every cut.

    Args:
        plan: found on some net.
        model: the other net. It is not touched.
        data: one (inputs, target) pair or an iterable of such; None: noise in the shapes of the plan's inputs.
        by: ``"path"``: cut behind the same module paths. ``"fraction"``: a cut behind base layer i of B (from 1) goes
            where the other net's base layer j of C has j/C nearest to i/B; of two as near the earlier. Where two cuts
            want the same layer, the sum of the distances decides, then the earlier cuts. None: by path if both nets
            have as many base layers and all paths are legal cuts, else by fraction.
        leaf_modules: module paths that are kept whole while tracing.

    Raises:
        PlanError: the nets do not correspond: paths that are missing, or more cuts than base layers.
        HeadError: a head does not fit at its new place.
        DataError: the model does not take the inputs.
    """
    if by not in (None, "path", "fraction"):
        raise PlanError(f"by={by!r}: a plan is transferred by 'path' or by 'fraction'; None takes what fits.")
    name = type(model).__name__
    traced, example = analysed(plan, model, data, leaf_modules, named=plan.cuts if by == "path" else ())
    layers = base_layers(traced.train)
    if by is None:
        known = resolve(traced.train.graph)
        by = "path" if len(layers) == len(plan.base_layers) and all(cut in known for cut in plan.cuts) else "fraction"
    cuts = _by_path(plan, traced, name) if by == "path" else _by_fraction(plan, layers, name)
    pairs = list(zip(plan.cuts, cuts, strict=True))
    check_heads(plan, cuts, traced)
    kept = {"search": plan.provenance["search"]} if "search" in plan.provenance else {}
    source = {"model": plan.model, "base_layers": len(plan.base_layers) + 1}
    moves = ", ".join(f"{old} -> {new}" for old, new in pairs)
    log.info("the plan of %s for %s, by %s: %s", plan.model, name, by, moves)
    return dataclasses.replace(
        plan,
        cuts=tuple(cuts),
        model=name,
        base_layers=tuple(layers),
        inputs=described(example),
        capture=None,
        block_seconds=None,
        provenance={**kept, "transfer": {"from": source, "by": by, "map": [list(pair) for pair in pairs]}},
    )


def analysed(
    plan: Plan, model: nn.Module, data: Any, leaf_modules: Collection[str], named: Sequence[str]
) -> tuple[Analysed, Args]:
    """Analyse a model as a plan wants it cut, on `data`, else on noise in the shapes of the plan's inputs.

    Raises:
        DataError: there is neither data nor a description of the inputs, or it does not fit the model.
        PlanError: the model lacks the plan's root.
    """
    owned = own(model, inplace=True)
    if plan.root and plan.root not in dict(owned.named_modules(remove_duplicate=False)):
        raise PlanError(
            f"the plan cuts inside of {plan.root!r}, which {type(model).__name__} does not have"
            f"{did_you_mean(plan.root, [path for path, _ in owned.named_modules()])}."
        )
    device = device_of(owned)
    if data is not None:
        example = Args(**to_device(first_pair(data)[0].bind(owned.forward), device))
    elif plan.inputs:
        example = Args(**example_like(plan.inputs, device).bind(owned.forward))
    else:
        raise DataError("the plan does not say what the model's inputs look like: hand one batch in data=(inputs, y).")
    where = Where(plan.blocks, root=plan.root, named=tuple(named))
    return analyse(owned, example, plan.output, leaf_modules, where), example


def check_heads(plan: Plan, cuts: Sequence[str], traced: Analysed) -> None:
    """Try the plan's heads behind other cuts; those that are not registered are left to who hands their factories.

    Raises:
        HeadError: one does not fit there; with the shapes of the activation and of the output.
    """
    registered = set(head_names())
    for old, cut, head in zip(plan.cuts, cuts, plan.heads, strict=True):
        if head not in registered or head is None:
            continue
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                build_head(head, traced.contexts[cut])
        except HeadError as error:
            raise HeadError(f"the head of the plan's cut {old!r} does not fit: {error}") from None


def nearest_layers(cuts: Sequence[int], count: int, target: int) -> list[int]:
    """Place cuts of a net of `count` base layers in one of `target`, each as near as can be to its fraction of the net.

    A cut behind base layer i (0-based) lies at the fraction (i+1)/count. Of all strictly increasing choices of j below
    target - 1 the one whose sum of ``|(j+1)/target - (i+1)/count|`` is least; of equals the first in lexicographic
    order. Where no two cuts want the same layer, that is the nearest layer for each, the earlier of two.

    Args:
        cuts: 0-based base layers, ascending, at most target - 1.
        count: base layers of the net they come from.
        target: base layers of the net they go to.
    """
    places = target - 1  # behind the last base layer stands the model's own output

    def distance(i: int, j: int) -> int:
        return abs((j + 1) * count - (i + 1) * target)  # in units of 1/(count * target): exact

    # rests[k][j]: least sum over the cuts from the k-th on, the k-th at j or later.
    rests: list[list[float]] = [[0] * (places + 2)]
    for i in reversed(cuts):
        rest: list[float] = [math.inf] * (places + 2)
        for j in reversed(range(places)):
            rest[j] = min(rest[j + 1], distance(i, j) + rests[0][j + 1])
        rests.insert(0, rest)
    found: list[int] = []
    for k, i in enumerate(cuts):
        start = found[-1] + 1 if found else 0
        at = (j for j in range(start, places) if distance(i, j) + rests[k + 1][j + 1] == rests[k][start])
        found.append(next(at))
    return found


def _by_path(plan: Plan, traced: Analysed, name: str) -> list[str]:
    known = resolve(traced.train.graph)
    missing = [cut for cut in plan.cuts if cut not in known]
    if missing:
        raise PlanError(
            f"the plan, made for {plan.model or 'some model'}, does not correspond to {name}: it names "
            f"{', '.join(map(repr, missing))}, where {name} has no legal cut{did_you_mean(missing[0], known)}. "
            "by='fraction' goes by the number of base layers instead."
        )
    order = {node: k for k, node in enumerate(traced.train.graph.nodes)}
    nodes = [known[cut] for cut in plan.cuts]
    if any(order[first] >= order[second] for first, second in itertools.pairwise(nodes)):
        raise PlanError(f"the plan does not correspond to {name}, which runs its cuts in another order: {plan.cuts}.")
    return [str(info(node).cut) for node in nodes]


def _by_fraction(plan: Plan, layers: Sequence[str], name: str) -> list[str]:
    source = plan.model or "the plan's model"
    position = {layer: k for k, layer in enumerate(plan.base_layers)}
    if strange := [cut for cut in plan.cuts if cut not in position]:
        raise PlanError(
            f"the plan cannot be transferred to {name} by fraction: its cuts {', '.join(map(repr, strange))} end none "
            f"of the {len(position) + 1} base layers of {source}. by='path' takes the same module paths."
        )
    if len(plan.cuts) > len(layers):
        raise PlanError(
            f"the plan does not correspond to {name}: it has {len(plan.cuts)} cuts, and {name} has "
            f"{len(layers) + 1} base layers, which have room for {len(layers)}. Search on {name} with fewer blocks."
        )
    at = [position[cut] for cut in plan.cuts]
    return [layers[k] for k in nearest_layers(at, len(position) + 1, len(layers) + 1)]
