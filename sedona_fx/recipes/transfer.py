"""Transfer of a plan to another net, a wider or a deeper one than it was found on.

SEDONA's authors search on narrow nets and train nets four times as wide by the same plan (Pyeon et al., ICLR 2021).
Between nets of different depth there is no published rule. Ours is to keep the position of a cut as a fraction of the
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

from sedona_fx.compile.analyse import analyse
from sedona_fx.compile.copying import owned_copy
from sedona_fx.compile.where import Where
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
    """Return a plan for another net, with cuts at the same paths in a wider one, at the same fractions in a deeper one.

    Heads keep their names, and devices their order. ``provenance["transfer"]`` records where every cut went.

    Args:
        plan: a plan that was found on some net.
        model: the other net. It is not changed.
        data: one (inputs, target) pair or an iterable of pairs; None: noise in the shapes of the plan's inputs.
        by: ``"path"``: the same module paths. ``"fraction"``: a cut after base layer i of B (counted from 1) goes after
            the base layer j of the other net's C for which j/C is nearest to i/B; of two that are equally near, the
            earlier one. If two cuts want the same layer, the sum of the distances decides, then the earlier cuts. None:
            by path if both nets have the same number of base layers and all paths are legal cuts, else by fraction.
        leaf_modules: module paths that are kept whole while tracing.

    Returns:
        The plan, for ``decouple(model, data, plan=...)``.

    Raises:
        PlanError: the nets do not correspond: a path is missing, or there are more cuts than base layers.
        HeadError: a head does not fit at its new position.
        DataError: the model does not take the inputs, or nothing says what they look like.
    """
    if by not in (None, "path", "fraction"):
        raise PlanError(f"by={by!r}: a plan is transferred by 'path' or by 'fraction'; None takes what fits.")
    name = type(model).__name__
    traced, example = analyse_for_plan(plan, model, data, leaf_modules, named=plan.cuts if by == "path" else ())
    layers = base_layers(traced.train)
    if by is None:
        legal = resolve(traced.train.graph)
        by = "path" if len(layers) == len(plan.base_layers) and all(cut in legal for cut in plan.cuts) else "fraction"
    cuts = _by_path(plan, traced, name) if by == "path" else _by_fraction(plan, layers, name)
    pairs = list(zip(plan.cuts, cuts, strict=True))
    check_heads(plan, cuts, traced)
    search = {"search": plan.provenance["search"]} if "search" in plan.provenance else {}
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
        loss=None,
        local_losses=None,
        block_seconds=None,
        provenance={**search, "transfer": {"from": source, "by": by, "map": [list(pair) for pair in pairs]}},
    )


def analyse_for_plan(
    plan: Plan, model: nn.Module, data: Any, leaf_modules: Collection[str], named: Sequence[str]
) -> tuple[Analysed, Args]:
    """Analyse a model for as many blocks, and with the root and the primary output, as a plan has.

    Args:
        plan: the plan.
        model: the net to be analysed. It is not changed.
        data: one (inputs, target) pair or an iterable of pairs; None: noise in the shapes of the plan's inputs.
        leaf_modules: module paths that are kept whole while tracing.
        named: names of cut points that are legal however many activations cross there.

    Returns:
        What analysis found out about the model, and the batch that it was traced with.

    Raises:
        DataError: there is neither data nor a description of the inputs, or it does not fit the model.
        PlanError: the model does not have the plan's root.
    """
    owned = owned_copy(model, inplace=True)
    if plan.root and plan.root not in dict(owned.named_modules(remove_duplicate=False)):
        near = did_you_mean(plan.root, [path for path, _ in owned.named_modules()])
        raise PlanError(
            f"the plan cuts inside of {plan.root!r}, which {type(model).__name__} does not have{near}. Take a net in "
            "which the part to be cut has that name, or search on this one."
        )
    device = device_of(owned)
    if data is not None:
        example = Args(**to_device(first_pair(data)[0].bind(owned.forward), device))
    elif plan.inputs:
        example = Args(**example_like(plan.inputs, device).bind(owned.forward))
    else:
        raise DataError("the plan does not say what the model's inputs look like: hand one batch in data=(inputs, y).")
    where = Where(plan.blocks, plan.max_live, root=plan.root, named=tuple(named))
    return analyse(owned, example, plan.output, leaf_modules, where), example


def check_heads(plan: Plan, cuts: Sequence[str], traced: Analysed) -> None:
    """Try the plan's heads at other cuts. Heads that are not registered are skipped: their factories are not known yet.

    Args:
        plan: the plan.
        cuts: for each of its cuts, the cut point that takes its place.
        traced: what analysis found out about the other net.

    Raises:
        HeadError: a head does not fit there; with the shapes of the activation and of the output.
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
    """Move cuts from a net of `count` base layers to one of `target`, each as near as possible to its fraction.

    A cut after base layer i (0-based) is at the fraction (i+1)/count. Of all strictly increasing choices of layers j
    below target - 1, the one with the least sum of ``|(j+1)/target - (i+1)/count|`` is taken; of equal ones, the first
    in lexicographic order. If no two cuts want the same layer, each gets the nearest layer, of two the earlier.

    Args:
        cuts: 0-based base layers in ascending order, at most target - 1 of them.
        count: number of base layers of the net that they come from.
        target: number of base layers of the net that they go to.

    Returns:
        The 0-based base layers of the other net, in ascending order.
    """
    positions = target - 1  # after the last base layer is the model's own output

    def distance(i: int, j: int) -> int:
        return abs((j + 1) * count - (i + 1) * target)  # in units of 1/(count * target), so that it is exact

    # least_sums[k][j]: least sum over the cuts from the k-th on, with the k-th at j or later.
    least_sums: list[list[float]] = [[0] * (positions + 2)]
    for i in reversed(cuts):
        sums: list[float] = [math.inf] * (positions + 2)
        for j in reversed(range(positions)):
            sums[j] = min(sums[j + 1], distance(i, j) + least_sums[0][j + 1])
        least_sums.insert(0, sums)
    chosen: list[int] = []
    for k, i in enumerate(cuts):
        start = chosen[-1] + 1 if chosen else 0
        best = (j for j in range(start, positions) if distance(i, j) + least_sums[k + 1][j + 1] == least_sums[k][start])
        chosen.append(next(best))
    return chosen


def _by_path(plan: Plan, traced: Analysed, name: str) -> list[str]:
    legal = resolve(traced.train.graph)
    missing = [cut for cut in plan.cuts if cut not in legal]
    if missing:
        raise PlanError(
            f"the plan, made for {plan.model or 'some model'}, does not correspond to {name}: it names "
            f"{', '.join(map(repr, missing))}, where {name} has no legal cut{did_you_mean(missing[0], legal)}. "
            "by='fraction' goes by the number of base layers instead."
        )
    order = {node: k for k, node in enumerate(traced.train.graph.nodes)}
    nodes = [legal[cut] for cut in plan.cuts]
    if any(order[first] >= order[second] for first, second in itertools.pairwise(nodes)):
        raise PlanError(
            f"the plan does not correspond to {name}, which runs its cuts in another order: {plan.cuts}. by='fraction' "
            "goes by the number of base layers instead."
        )
    return [str(info(node).cut) for node in nodes]


def _by_fraction(plan: Plan, layers: Sequence[str], name: str) -> list[str]:
    source = plan.model or "the plan's model"
    position = {layer: k for k, layer in enumerate(plan.base_layers)}
    if others := [cut for cut in plan.cuts if cut not in position]:
        raise PlanError(
            f"the plan cannot be transferred to {name} by fraction: its cuts {', '.join(map(repr, others))} end none "
            f"of the {len(position) + 1} base layers of {source}. by='path' takes the same module paths."
        )
    if len(plan.cuts) > len(layers):
        raise PlanError(
            f"the plan does not correspond to {name}: it has {len(plan.cuts)} cuts, and {name} has "
            f"{len(layers) + 1} base layers, which have room for {len(layers)}. Search on {name} with fewer blocks."
        )
    places = [position[cut] for cut in plan.cuts]
    return [layers[k] for k in nearest_layers(places, len(position) + 1, len(layers) + 1)]
