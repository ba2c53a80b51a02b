"""The one call. It reads top to bottom as the pipeline."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sedona_fx.compile.analyse import Analysed, Where, analyse, check_target, check_validation
from sedona_fx.compile.build import as_trained, compile_net, own
from sedona_fx.compile.choices import (
    Cuts,
    Heads,
    by_name,
    candidates,
    from_names,
    from_plan,
    named_cuts,
    with_free_heads,
    with_objectives,
)
from sedona_fx.data.args import Args
from sedona_fx.data.sources import Mapped, Source, first_pair, search_sources, to_device
from sedona_fx.errors import CutError, DataError, HeadError, PlanError, did_you_mean
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLosses, one_a_block
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.modules import device_of
from sedona_fx.ir.outputs import Key, Loss
from sedona_fx.net.net import Net
from sedona_fx.net.signature import described, example_like
from sedona_fx.passes.cuts import base_layers
from sedona_fx.plan import Plan
from sedona_fx.search import SEARCHES, Decision, Problem, Search
from sedona_fx.search.problem.limits import Limits
from sedona_fx.search.problem.plan_costs import check_possible, within_budget


def decouple(
    model: nn.Module,
    data: Any,
    *,
    blocks: int = 4,
    loss: Loss | None = nn.functional.cross_entropy,
    val_data: Any = None,
    search: str | Search = "guided",
    cuts: Cuts = None,
    heads: Heads = None,
    local_loss: LocalLosses = None,
    plan: Plan | str | Path | None = None,
    budget: Limits | Mapping[str, Any] | None = None,
    devices: Sequence[str | torch.device] | None = None,
    output: Key = None,
    root: str = "",
    leaf_modules: Collection[str] = (),
    no_cut: Collection[str] = (),
    max_live: int | None = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> Net:
    """Cut a model into blocks that train without waiting for each other.

    Args:
        model: any ``nn.Module``. It is not touched (unless `inplace`); the net owns a copy.
        data: an iterable of (inputs, target) batches, or one such pair as a tuple. Inputs: a tuple is positional, a
            mapping is keywords, anything else is one argument; ``sedona_fx.Args(...)`` says it explicitly.
        blocks: K. With `cuts` or `plan` these decide.
        loss: ``loss(output, target)``, a scalar tensor.
        val_data: for the search, no example of it in `data`; None: a map-style loader's indices are split 60/40 by
            `seed`, other re-iterables by whole batches.
        search: ``"guided"`` (gradients prune, rollouts decide), ``"sedona"`` (the paper's), ``"rollout"``,
            ``"balanced"``, ``"uniform"``, ``"latest"``, or a configured search such as ``Sedona(unroll=1)``. One single
            pair of data serves the latter three names only.
        cuts: your own cuts instead of a search: module paths, a cut behind each; or a mapping from module paths to
            ``"end"`` or ``"beginning"``.
        heads: candidates by registered name or as factories ``HeadContext -> nn.Module`` (by rule, not by search, the
            first is taken, or with ``Uniform(head="largest")`` and the like the largest; with `cuts`, one a cut or one
            for all); None: by the shapes; False: no heads, for schedules that need none.
        local_loss: an objective of your own for the blocks but the last, one for all or one (or None) a block.
        plan: a plan or its path: nothing is searched.
        budget: what the plan may cost at most, ``Limits(activation_bytes=..., block_flops=..., block_seconds=...,
            head_flops=...)``, any of them, or a mapping. The search's plan is its best within; `cuts` or a `plan` that
            exceed it are refused.
        devices: one device a block; None: as `plan` says, else where the model is.
        output: key, attribute or index of the primary output; None: ``logits``, else the only or first float tensor.
        root: module path of the part to cut; what is around it belongs to the first and the last block. If the code
            around it cannot be traced, it runs as it is, and what it does before `root` runs twice a step.
        leaf_modules: module paths that are kept whole while tracing.
        no_cut: module paths inside of which there is no cut.
        max_live: how many activations may cross at a cut; None: as few as give the blocks asked for.
        seed: of the search, of the heads' initial weights, and of the blocks' random draws in training.
        progress: show progress bars.
        inplace: share the user's Parameter objects instead of copying them.

    Returns:
        The net.

    Raises:
        SedonaError: every kind of bad input, with the place in the model and what to do.
    """
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise CutError(f"blocks={blocks!r}: give a whole number, at least 1 (1 is backpropagation).")
    if loss is not None and not callable(loss):
        raise DataError(f"loss={loss!r} cannot be called: give a function loss(output, target) or None.")
    chosen = _search_of(search)
    given = _plan_given(plan)
    limits = Limits.of(budget, given)
    named = named_cuts(cuts)
    count = given.blocks if given is not None else blocks if named is None else len(named) + 1
    places = _devices(devices if devices is not None or given is None else given.devices, count)
    owned = own(model, inplace=inplace)
    inputs, target = first_pair(data)
    example = Args(**to_device(inputs.bind(owned.forward), device_of(owned)))
    wanted = given.output if given is not None and output is None else output
    part = root if given is None or root else given.root
    where = Where(count, max_live, part, _paths(no_cut), tuple(given.cuts if given is not None else named or ()))
    traced = analyse(owned, example, wanted, leaf_modules, where)
    check_target(traced, example, to_device(target, device_of(owned)), loss)
    if places is not None and traced.hosted:
        raise PlanError(f"the code around root={part!r} runs as it is, on one device: leave out devices=.")

    asked, objectives = heads, one_a_block(local_loss, count)
    if own_heads := [objective.head for objective in objectives if objective is not None]:
        traced = with_free_heads(traced)
        heads = own_heads[0] if heads is None else heads
    choosing = given is None and named is None
    searching = choosing and chosen.needs_data and blocks > 1
    if searching and own_heads:
        raise HeadError(
            f"search={search!r} compares heads by the model's own loss and cannot be combined with local_loss=...: "
            "choose cuts by rule (search='balanced'), by name (cuts=[...]), or by a plan."
        )
    if searching and loss is None:
        raise DataError(
            f"search={search!r} compares heads by the loss, and loss=None: hand loss=..., or choose cuts by rule "
            "(search='balanced'), by name (cuts=[...]), or by a plan."
        )
    sources = search_sources(data, val_data, seed, getattr(chosen, "val_batch_size", None)) if searching else None
    if sources is not None and loss is not None and val_data is not None:
        pair = next(_named(sources[1], owned)(), None)
        check_validation(owned, traced, to_device(pair, device_of(owned)), loss)
    problem = Problem(
        traced.train,
        traced.eval,
        count,
        traced.contexts,
        candidates(heads, traced, searching=searching) if choosing else {},
        traced.output,
        loss,
        (_named(sources[0], owned), _named(sources[1], owned), sources[2]) if sources is not None else None,
        seed,
        progress,
        traced.head_costs,
        limits,
        example.kwargs,
        dict(limits.measured or {}) if limits is not None else {},
        traced.free_batch,
    )
    decision: Decision
    with as_trained(owned):
        if given is not None:
            decision = from_plan(given, traced, by_name(heads) | {head_name(head): head for head in own_heads})
        elif named is not None:
            decision = from_names(list(traced.named), heads, traced)
        else:
            check_possible(problem)
            decision = chosen.decide(problem)
        if own_heads:
            decision = with_objectives(decision, objectives, asked, traced)
        decision = within_budget(problem, decision, PlanError if given is not None else CutError)
    made = _plan_of(decision, traced, owned, example, wanted, places, part, seed)
    return compile_net(owned, traced, example, decision.heads, made, loss, objectives, seed)


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    loss: Loss | None = nn.functional.cross_entropy,
    heads: Sequence[HeadSpec] = (),
    local_loss: LocalLosses = None,
    leaf_modules: Collection[str] = (),
    data: Any = None,
    inplace: bool = False,
) -> Net:
    """Make a net again from what ``net.save(folder)`` wrote and a model of the same architecture (its weights are not
    used).

    Args:
        folder: with ``plan.json`` and ``weights.pt``.
        model: the same architecture.
        loss: as in :func:`decouple`; functions are not saved.
        heads: the factories behind heads that are not registered by name.
        local_loss: as in :func:`decouple`.
        leaf_modules: as in :func:`decouple`.
        data: as in :func:`decouple`, for models that cannot run on noise of the right shape.
        inplace: share the user's Parameter objects instead of copying them; the weights are loaded into them.

    Raises:
        PlanError: the plan does not fit the model.
        CheckpointError: the weights do not.
    """
    plan = Plan.load(Path(folder) / "plan.json")
    owned = own(model, inplace=inplace)
    device = device_of(owned)
    if data is None:
        example = example_like(plan.inputs, device)
    else:
        example = Args(**to_device(first_pair(data)[0].bind(owned.forward), device))
    traced = analyse(owned, example, plan.output, leaf_modules, Where(plan.blocks, None, plan.root, named=plan.cuts))
    objectives = one_a_block(local_loss, plan.blocks)
    if own_heads := [objective.head for objective in objectives if objective is not None]:
        traced = with_free_heads(traced)
    decision = from_plan(plan, traced, by_name(heads) | {head_name(head): head for head in own_heads})
    decision = with_objectives(decision, objectives, heads, traced)  # their heads may share a name
    seed = int(plan.provenance.get("seed", 0))
    net = compile_net(owned, traced, example, decision.heads, plan, loss, objectives, seed)
    net.load_weights(Path(folder) / "weights.pt")
    return net


def _plan_given(plan: Any) -> Plan | None:
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    if plan is None or isinstance(plan, Plan):
        return plan
    raise PlanError(f"plan={plan!r} is neither a Plan nor the path of one.")


def _devices(devices: Sequence[str | torch.device] | None, blocks: int) -> tuple[str, ...] | None:
    """Return the devices as a plan names them, each of which has been tried."""
    if devices is None:
        return None
    if isinstance(devices, (str, torch.device)) or len(devices) != blocks:
        count = "one device" if isinstance(devices, (str, torch.device)) else f"{len(devices)} devices"
        raise PlanError(f"devices={devices!r} names {count} for {blocks} blocks: give a list with one a block.")
    for device in devices:
        try:
            torch.empty(0, device=device)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"devices names {str(device)!r}, which cannot be used here: {reason}") from None
    return tuple(str(device) for device in devices)


def _paths(paths: Collection[str]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _named(source: Source, model: nn.Module) -> Source:
    """Return an epoch of data with every input by its argument name."""
    return Mapped(source, lambda pair: (Args(**pair[0].bind(model.forward)), pair[1]))


def _search_of(search: str | Search) -> Search:
    if isinstance(search, str):
        if search not in SEARCHES:
            raise CutError(
                f"search={search!r} is not known{did_you_mean(search, SEARCHES)}; one of {sorted(SEARCHES)}."
            )
        return SEARCHES[search]()
    if isinstance(search, type) or not hasattr(search, "decide"):
        raise CutError(f"search={search!r} is no search: one of {sorted(SEARCHES)}, or an object with decide(problem).")
    return search


def _plan_of(
    decision: Decision,
    traced: Analysed,
    model: nn.Module,
    example: Args,
    output: Key,
    devices: tuple[str, ...] | None,
    root: str,
    seed: int,
) -> Plan:
    about = {
        "seed": seed,
        "front_end": traced.front_end,
        **({} if traced.free_batch else {"free_batch": False}),
        **({"host": "runs as it is"} if traced.hosted else {}),
        **({"left_out": list(traced.left_out)} if traced.left_out else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Plan(
        cuts=tuple(decision.cuts),
        heads=tuple(head_name(s) if s is not None else None for s in decision.heads),
        devices=devices,
        output=output,
        root=root,
        model=type(model).__name__,
        base_layers=tuple(base_layers(traced.train)),
        inputs=described(example),
        provenance={**decision.provenance, **about},
    )
