"""The one call. It reads top to bottom as the pipeline."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.args import Args
from sedona_fx.compile import Analysed, analyse, check_target, compile_net, device_of, own
from sedona_fx.data import Source, first_pair, search_sources, to_device
from sedona_fx.errors import CutError, DataError, HeadError, PlanError, did_you_mean
from sedona_fx.graph import describe, info
from sedona_fx.heads import default_candidates, default_head, head_name, head_names
from sedona_fx.net import Net, example_like
from sedona_fx.outputs import Key
from sedona_fx.passes.cuts import base_layers, resolve
from sedona_fx.plan import Plan
from sedona_fx.search import SEARCHES, Decision, Problem, Search
from sedona_fx.search.problem import HeadSpec
from sedona_fx.train.engine import Loss


def decouple(
    model: nn.Module,
    data: Any,
    *,
    blocks: int = 4,
    loss: Loss | None = nn.functional.cross_entropy,
    val_data: Any = None,
    search: str | Search = "sedona",
    cuts: Sequence[str] | None = None,
    heads: Sequence[HeadSpec] | HeadSpec | bool | None = None,
    plan: Plan | str | Path | None = None,
    devices: Sequence[str | torch.device] | None = None,
    output: Key = None,
    leaf_modules: Collection[str] = (),
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
        val_data: for the search; None: a map-style loader's indices are split 60/40 by `seed`, other re-iterables by
            whole batches.
        search: ``"sedona"``, ``"balanced"``, ``"uniform"``, or a configured search such as ``Sedona(unroll=1)``. One
            single pair of data serves the latter two only.
        cuts: your own cuts instead of a search: module paths, a cut behind each.
        heads: candidates by registered name or as factories ``HeadContext -> nn.Module`` (by rule, not by search, the
            first is taken; with `cuts`, one a cut or one for all); None: by the shapes; False: no heads, for schedules
            that need none.
        plan: a plan or its path: nothing is searched.
        devices: one device a block; None: as `plan` says, else where the model is.
        output: key, attribute or index of the primary output; None: ``logits``, else the only or first float tensor.
        leaf_modules: module paths that are kept whole while tracing.
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
    named_cuts = [cuts] if isinstance(cuts, str) else cuts
    count = given.blocks if given is not None else blocks if named_cuts is None else len(named_cuts) + 1
    places = _devices(devices if devices is not None or given is None else given.devices, count)
    owned = own(model, inplace=inplace)
    inputs, target = first_pair(data)
    example = Args(**to_device(inputs.bind(owned.forward), device_of(owned)))
    wanted = given.output if given is not None and output is None else output
    traced = analyse(owned, example, wanted, leaf_modules)
    check_target(traced, example, to_device(target, device_of(owned)), loss)

    decision: Decision
    if given is not None:
        decision = _from_plan(given, traced, _by_name(heads))
    elif named_cuts is not None:
        decision = _from_names(list(named_cuts), heads, traced)
    else:
        searching = chosen.needs_data and blocks > 1
        sources = search_sources(data, val_data, seed, getattr(chosen, "val_batch_size", None)) if searching else None
        problem = Problem(
            traced.train,
            traced.eval,
            blocks,
            traced.contexts,
            _candidates(heads, traced, searching=searching),
            traced.output,
            loss,
            (_named(sources[0], owned), _named(sources[1], owned), sources[2]) if sources is not None else None,
            seed,
            progress,
        )
        decision = chosen.decide(problem)
    made = _plan_of(decision, traced, owned, example, wanted, places, seed)
    return compile_net(owned, traced, example, decision.heads, made, loss, seed)


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    loss: Loss | None = nn.functional.cross_entropy,
    heads: Sequence[HeadSpec] = (),
    leaf_modules: Collection[str] = (),
    inplace: bool = False,
) -> Net:
    """Make a net again from what ``net.save(folder)`` wrote and a model of the same architecture (its weights are not
    used).

    Args:
        folder: with ``plan.json`` and ``weights.pt``.
        model: the same architecture.
        loss: as in :func:`decouple`; functions are not saved.
        heads: the factories behind heads that are not registered by name.
        leaf_modules: as in :func:`decouple`.
        inplace: share the user's Parameter objects instead of copying them; the weights are loaded into them.

    Raises:
        PlanError: the plan does not fit the model.
        CheckpointError: the weights do not.
    """
    plan = Plan.load(Path(folder) / "plan.json")
    owned = own(model, inplace=inplace)
    example = example_like(plan.inputs, device_of(owned))
    traced = analyse(owned, example, plan.output, leaf_modules)
    decision = _from_plan(plan, traced, _by_name(heads))
    net = compile_net(owned, traced, example, decision.heads, plan, loss, int(plan.provenance.get("seed", 0)))
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


def _named(source: Source, model: nn.Module) -> Source:
    """Return an epoch of data with every input by its argument name."""
    return lambda: ((Args(**args.bind(model.forward)), target) for args, target in source())


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


def _as_list(heads: Sequence[HeadSpec] | HeadSpec | bool | None) -> list[HeadSpec]:
    if heads is True or heads is None or heads is False:
        return []
    if isinstance(heads, str) or callable(heads):
        return [heads]
    return list(heads)


def _by_name(heads: Sequence[HeadSpec] | HeadSpec | bool | None) -> dict[str, HeadSpec]:
    return {head_name(spec): spec for spec in _as_list(heads)}


def _candidates(
    heads: Sequence[HeadSpec] | HeadSpec | bool | None, traced: Analysed, *, searching: bool
) -> dict[str, list[HeadSpec]]:
    """Return the candidate heads of every legal cut point."""
    if heads is False:
        return {name: [] for name in traced.contexts}
    given = _as_list(heads)
    if given:
        return dict.fromkeys(traced.contexts, given)
    if searching:
        return {name: list(default_candidates(context)) for name, context in traced.contexts.items()}
    return {name: [default_head(context)] for name, context in traced.contexts.items()}


def _from_names(cuts: list[str], heads: Sequence[HeadSpec] | HeadSpec | bool | None, traced: Analysed) -> Decision:
    """Cut where the user says."""
    nodes = _resolve(cuts, traced, CutError, "cuts")
    given = _as_list(heads)
    if heads is False:
        specs: list[HeadSpec | None] = [None] * len(nodes)
    elif not given:
        specs = [*(default_head(traced.contexts[name]) for name in nodes)]
    elif len(given) in (1, len(nodes)):
        specs = [*given] * (len(nodes) if len(given) == 1 else 1)
    else:
        raise HeadError(f"{len(nodes)} cuts take one head for all or {len(nodes)} heads, not {len(given)}.")
    return Decision(nodes, specs, {"search": "user"})


def _from_plan(plan: Plan, traced: Analysed, factories: Mapping[str, HeadSpec]) -> Decision:
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
    return Decision(nodes, specs, dict(plan.provenance))


def _resolve(names: list[str], traced: Analysed, error: type[Exception], who: str) -> list[str]:
    """Return the canonical names of cuts, in the order of the program, or say which is missing and why."""
    known = resolve(traced.train.graph)
    for name in names:
        if name in known:
            continue
        if not isinstance(name, str):
            raise error(f"{who} names {name!r}, which is no name: a cut is a module path such as 'layer1.0'.")
        elsewhere = [n for n in traced.train.graph.nodes if name in (info(n).site, *info(n).returned_by)]
        if elsewhere:
            raise error(
                f"{who} names {name!r}, which is in the model ({describe(elsewhere[0])}) but no legal cut: more than "
                "one activation crosses there, or one that later code overwrites, or it is not there in evaluation"
                f"{did_you_mean(name, known)}. net.plan.base_layers lists good ones."
            )
        raise error(f"{who} names the cut {name!r}, which this model does not have{did_you_mean(name, known)}.")
    position = {node: k for k, node in enumerate(traced.train.graph.nodes)}
    nodes = [known[name] for name in names]
    if [position[n] for n in nodes] != sorted({position[n] for n in nodes}):
        raise error(f"{who} must name cuts in the order of the forward pass, each once: {names}.")
    return [str(info(node).cut) for node in nodes]


def _plan_of(
    decision: Decision,
    traced: Analysed,
    model: nn.Module,
    example: Args,
    output: Key,
    devices: tuple[str, ...] | None,
    seed: int,
) -> Plan:
    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return value

    about = {
        "seed": seed,
        "front_end": "symbolic",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Plan(
        cuts=tuple(decision.cuts),
        heads=tuple(head_name(s) if s is not None else None for s in decision.heads),
        devices=devices,
        output=output,
        model=type(model).__name__,
        base_layers=tuple(base_layers(traced.train)),
        inputs={name: pytree.tree_map(spec, value) for name, value in example.kwargs.items()},
        provenance={**decision.provenance, **about},
    )
