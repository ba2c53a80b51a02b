"""What the user chose: cuts by name, heads, a plan. Names are resolved to cut points, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sedona_fx.capture.whole.grad_calls import derivatives
from sedona_fx.errors import CutError, HeadError, PlanError, did_you_mean
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLoss
from sedona_fx.heads.registry import default_candidates, default_head, head_name, head_names, reads
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import describe, info
from sedona_fx.passes.cuts import follow_one_another, resolve
from sedona_fx.plan import Plan
from sedona_fx.search import Decision

Heads = Sequence[HeadSpec] | HeadSpec | bool | None
"""``decouple(heads=...)``: candidates, or False for no heads; None and True: the built-in ones that fit."""

Cuts = Sequence[str] | Mapping[str, str] | str | None
"""``decouple(cuts=...)``: module paths, or module path -> ``"end"`` or ``"beginning"``; None: a search chooses."""


def _as_list(heads: Heads) -> list[HeadSpec]:
    if heads is True or heads is None or heads is False:
        return []
    if isinstance(heads, str) or callable(heads):
        return [heads]
    return list(heads)


def by_name(heads: Heads) -> dict[str, HeadSpec]:
    """Return name -> head for the heads that the user gave, by the names that a plan has for them.

    Raises:
        CutError: two different heads have the same name, so that a plan could not say which of them it means.
    """
    named: dict[str, HeadSpec] = {}
    specs = _as_list(heads)
    for spec in specs:
        name = head_name(spec)
        if named.setdefault(name, spec) != spec and name not in head_names():
            first, second = specs.index(named[name]), specs.index(spec)
            raise CutError(
                f"heads[{first}] and heads[{second}] are different factories of one name, {name!r}, by which a plan "
                "could not tell them apart: give each a name of its own with sedona_fx.register_head(name, factory)."
            )
    return named


def named_cuts(cuts: Cuts) -> list[tuple[str, str]] | None:
    """Return the user's cuts as (module path, ``"end"`` or ``"beginning"``) in the user's order; None without any.

    Raises:
        CutError: a name is not a text, or a side is neither of the two.
    """
    if cuts is None:
        return None
    if isinstance(cuts, str):
        return [(cuts, "end")]
    named = list(cuts.items()) if isinstance(cuts, Mapping) else [(name, "end") for name in cuts]
    for name, side in named:
        if not isinstance(name, str):
            raise CutError(f"cuts names {name!r}, which is no name: a cut is a module path such as 'layer1.0'.")
        if side not in ("end", "beginning"):
            raise CutError(f"cuts={{{name!r}: {side!r}}}: a cut stands at the 'beginning' or at the 'end' of a module.")
    return named


def candidates(heads: Heads, traced: Analysed, *, searching: bool) -> dict[str, list[HeadSpec]]:
    """Return the candidate heads of every legal cut point that a head can be built for.

    Args:
        heads: what the user gave. Candidates of the user are offered everywhere but where activations are complex and
            a candidate is a built-in head.
        traced: the model's graphs, with what a head has to fit at each cut point.
        searching: whether a search compares candidates; a rule gets the one default head of each cut point.

    Raises:
        CutError: two different heads have the same name.
        HeadError: there are cut points, and no built-in head fits at any of them.
    """
    specs = _as_list(heads)
    by_name(heads)
    if heads is False:
        return dict.fromkeys(traced.contexts, specs)
    if specs:
        return {name: specs for name, context in traced.contexts.items() if all(reads(s, context) for s in specs)}
    fitting: dict[str, list[HeadSpec]] = {}
    first_refusal: HeadError | None = None
    for name, context in traced.contexts.items():
        try:
            fitting[name] = list(default_candidates(context)) if searching else [default_head(context)]
        except HeadError as error:
            first_refusal = first_refusal or error
    if first_refusal is not None and not fitting:
        count = len(traced.contexts)
        points = f"any of the {count} legal cut points" if count > 1 else "the only legal cut point"
        raise HeadError(f"there is no built-in head for {points} of this model: {first_refusal}") from first_refusal
    return fitting


def from_names(cuts: list[str], heads: Heads, traced: Analysed) -> Decision:
    """Return the decision for cuts that the user names.

    Args:
        cuts: names of cut points.
        heads: what the user gave: one head for each cut, or one for all; None: the default heads.
        traced: the model's graphs.

    Raises:
        CutError: a cut is not legal, the order is wrong, or two different heads have the same name.
        HeadError: the number of heads is wrong, or there is no default head for a cut.
    """
    advice = "A cut is the path of a module that the forward calls, as in model.named_modules()."
    names = _resolve(cuts, traced, CutError, "cuts", advice)
    given = _as_list(heads)
    if heads is False:
        specs: list[HeadSpec | None] = [None] * len(names)
    elif not given:
        specs = [*(default_head(traced.contexts[name]) for name in names)]
    elif len(given) in (1, len(names)):
        by_name(heads)
        specs = [*given] * (len(names) if len(given) == 1 else 1)
    else:
        raise HeadError(f"{len(names)} cuts take one head for all or {len(names)} heads, not {len(given)}.")
    return Decision(names, specs, {"search": "user"})


def with_free_heads(traced: Analysed) -> Analysed:
    """Return the analysis with heads free in what they output, for objectives of the user's own that read it."""
    free = {name: replace(context, free_output=True) for name, context in traced.contexts.items()}
    return replace(traced, contexts=free)


def with_objectives(
    decision: Decision, objectives: Sequence[LocalLoss | None], heads: Heads, traced: Analysed
) -> Decision:
    """Return the decision with the head of its objective for every block that has an objective of its own.

    Args:
        decision: the cuts and heads that were chosen without a look at the objectives.
        objectives: for each block but the last the user's own objective, or None.
        heads: the user's candidates. None: blocks without an objective of their own get the default heads.
        traced: the model's graphs.
    """
    specs: list[HeadSpec | None] = []
    for cut, objective, spec in zip(decision.cuts, objectives, decision.heads, strict=True):
        if objective is not None:
            specs.append(objective.head)
        else:
            specs.append(spec if heads is not None else default_head(traced.contexts[cut]))
    return replace(decision, heads=specs)


def from_plan(plan: Plan, traced: Analysed, factories: Mapping[str, HeadSpec]) -> Decision:
    """Return the decision of a plan.

    Args:
        plan: the plan to apply.
        traced: the model's graphs.
        factories: name -> head for the heads that the user gave; they come before registered ones.

    Raises:
        PlanError: a cut is not legal on this model, or a head is neither given nor registered.
    """
    who = f"the plan, made for {plan.model or 'some model'},"
    advice = "sedona_fx.transfer_plan(plan, model) makes a plan for another net."
    names = _resolve(list(plan.cuts), traced, PlanError, who, advice)
    specs: list[HeadSpec | None] = []
    for cut, name in zip(plan.cuts, plan.heads, strict=True):
        if name is not None and name not in factories and name not in head_names():
            raise PlanError(
                f"the plan wants the head {name!r} behind {cut!r}, which is not registered"
                f"{did_you_mean(name, head_names())}. Register it with sedona_fx.register_head, or hand its factory in "
                "heads=[...]."
            )
        specs.append(factories.get(name, name) if name is not None else None)
    measured = dict(plan.block_seconds) if plan.block_seconds is not None else None
    return Decision(names, specs, dict(plan.provenance), measured)


def _resolve(names: list[str], traced: Analysed, error: type[Exception], who: str, advice: str) -> list[str]:
    """Return the names that the graph has for cuts, or raise `error` for the first that is not legal.

    Args:
        names: any names of cut points, in the order of the forward pass.
        traced: the model's graphs.
        error: class of the error.
        who: what names the cuts, for messages.
        advice: what to do about a cut that is not in the model.
    """
    legal = resolve(traced.train.graph)
    for name in names:
        if name in legal:
            continue
        elsewhere = [n for n in traced.train.graph.nodes if name in (info(n).site, *info(n).returned_by)]
        if elsewhere:
            raise error(
                f"{who} names {name!r}, which is in the model ({describe(elsewhere[0])}) but no legal cut: it is no "
                "float activation, or its rows are no examples of the batch, or only the output follows it, or later "
                "code writes into it through a view, or it is not there in evaluation, or weights in front of it would "
                "get no gradient (a detach lies between)"
                f"{did_you_mean(name, legal)}. net.plan.base_layers lists good ones.{derivatives(traced.train.graph)}"
            )
        if inside := [other for other in legal if other.startswith(f"{name}.")]:
            raise error(
                f"{who} names the module {name!r}, which returns several values, and a block ends at one: name a cut "
                f"inside of it, the last is {inside[-1]!r}."
            )
        near = did_you_mean(name, legal)
        raise error(f"{who} names the cut {name!r}, which this model does not have{near}. {advice}")
    position = {node: k for k, node in enumerate(traced.train.graph.nodes)}
    nodes = [legal[name] for name in names]
    in_order = sorted(set(nodes), key=position.__getitem__)
    if nodes != in_order:
        order = [str(info(node).cut) for node in in_order]
        raise error(f"{who} must name cuts in the order of the forward pass, each once: {names}. It is {order}.")
    if not follow_one_another(traced.train.graph, nodes):
        raise error(f"{who} names cuts that lie side by side, {names}: blocks follow one another. Take one branch.")
    return [str(info(node).cut) for node in nodes]
