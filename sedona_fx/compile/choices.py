"""What the user decided: cuts by name, heads, a plan. Names become cut points, or an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sedona_fx.errors import CutError, HeadError, PlanError, did_you_mean
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLoss
from sedona_fx.heads.registry import default_candidates, default_head, head_name, head_names
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import describe, info
from sedona_fx.passes.cuts import follow_one_another, resolve
from sedona_fx.plan import Plan
from sedona_fx.search import Decision

Heads = Sequence[HeadSpec] | HeadSpec | bool | None
Cuts = Sequence[str] | Mapping[str, str] | str | None


def _as_list(heads: Heads) -> list[HeadSpec]:
    if heads is True or heads is None or heads is False:
        return []
    if isinstance(heads, str) or callable(heads):
        return [heads]
    return list(heads)


def by_name(heads: Heads) -> dict[str, HeadSpec]:
    """Return the heads that the user gave, by the names a plan has for them.

    Raises:
        CutError: two different ones have one name, so that a plan would not say which of them it means.
    """
    found: dict[str, HeadSpec] = {}
    given = _as_list(heads)
    for spec in given:
        name = head_name(spec)
        if found.setdefault(name, spec) != spec and name not in head_names():
            first, second = given.index(found[name]), given.index(spec)
            raise CutError(
                f"heads[{first}] and heads[{second}] are different factories of one name, {name!r}, by which a plan "
                "could not tell them apart: give each a name of its own with sedona_fx.register_head(name, factory)."
            )
    return found


def named_cuts(cuts: Cuts) -> list[tuple[str, str]] | None:
    """Return the user's cuts as (module path, ``"end"`` or ``"beginning"``), in the user's order.

    Raises:
        CutError: not a name, a list of names, or a mapping from names to one of these words.
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

    Raises:
        CutError: two different heads have one name.
        HeadError: there are cut points, and no built-in head fits behind any of them.
    """
    given = _as_list(heads)
    by_name(heads)
    if heads is False or given:
        return dict.fromkeys(traced.contexts, given)
    found: dict[str, list[HeadSpec]] = {}
    refusal: HeadError | None = None
    for name, context in traced.contexts.items():
        try:
            found[name] = list(default_candidates(context)) if searching else [default_head(context)]
        except HeadError as error:
            refusal = refusal or error
    if refusal is not None and not found:
        raise refusal
    return found


def from_names(cuts: list[str], heads: Heads, traced: Analysed) -> Decision:
    """Cut where the user says."""
    nodes = _resolve(cuts, traced, CutError, "cuts")
    given = _as_list(heads)
    if heads is False:
        specs: list[HeadSpec | None] = [None] * len(nodes)
    elif not given:
        specs = [*(default_head(traced.contexts[name]) for name in nodes)]
    elif len(given) in (1, len(nodes)):
        by_name(heads)
        specs = [*given] * (len(nodes) if len(given) == 1 else 1)
    else:
        raise HeadError(f"{len(nodes)} cuts take one head for all or {len(nodes)} heads, not {len(given)}.")
    return Decision(nodes, specs, {"search": "user"})


def with_free_heads(traced: Analysed) -> Analysed:
    """Let heads give what they like: an objective of the user's own reads them."""
    free = {name: replace(context, free_output=True) for name, context in traced.contexts.items()}
    return replace(traced, contexts=free)


def with_objectives(
    decision: Decision, objectives: Sequence[LocalLoss | None], heads: Heads, traced: Analysed
) -> Decision:
    """Give every block that has an objective of its own the head of that objective."""
    chosen: list[HeadSpec | None] = []
    for cut, objective, spec in zip(decision.cuts, objectives, decision.heads, strict=True):
        if objective is not None:
            chosen.append(objective.head)
        else:
            chosen.append(spec if heads is not None else default_head(traced.contexts[cut]))
    return replace(decision, heads=chosen)


def from_plan(plan: Plan, traced: Analysed, factories: Mapping[str, HeadSpec]) -> Decision:
    """Apply a plan."""
    nodes = _resolve(list(plan.cuts), traced, PlanError, f"the plan, made for {plan.model or 'some model'},")
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
    return Decision(nodes, specs, dict(plan.provenance), measured)


def _resolve(names: list[str], traced: Analysed, error: type[Exception], who: str) -> list[str]:
    """Return the canonical names of cuts, in the order of the program, or say which is missing and why."""
    known = resolve(traced.train.graph)
    for name in names:
        if name in known:
            continue
        elsewhere = [n for n in traced.train.graph.nodes if name in (info(n).site, *info(n).returned_by)]
        if elsewhere:
            raise error(
                f"{who} names {name!r}, which is in the model ({describe(elsewhere[0])}) but no legal cut: it is no "
                "float activation, or only the output follows it, or later code writes into it through a view, or it "
                "is not there in evaluation, or weights in front of it would get no gradient (a detach lies between)"
                f"{did_you_mean(name, known)}. net.plan.base_layers lists good ones."
            )
        if inside := [other for other in known if other.startswith(f"{name}.")]:
            raise error(
                f"{who} names the module {name!r}, which returns several values, and a block ends at one: name a cut "
                f"inside of it, the last is {inside[-1]!r}."
            )
        raise error(f"{who} names the cut {name!r}, which this model does not have{did_you_mean(name, known)}.")
    position = {node: k for k, node in enumerate(traced.train.graph.nodes)}
    nodes = [known[name] for name in names]
    if [position[n] for n in nodes] != sorted({position[n] for n in nodes}):
        raise error(f"{who} must name cuts in the order of the forward pass, each once: {names}.")
    if not follow_one_another(traced.train.graph, nodes):
        raise error(f"{who} names cuts that lie side by side, {names}: blocks follow one another. Take one branch.")
    return [str(info(node).cut) for node in nodes]
