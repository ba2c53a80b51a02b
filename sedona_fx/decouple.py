"""The two calls that make a net: ``decouple``, and ``load`` for one that was saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sedona_fx.compile.analyse import analyse, check_target
from sedona_fx.compile.build import build
from sedona_fx.compile.choices import Cuts, Heads, with_free_heads
from sedona_fx.compile.decide import decide
from sedona_fx.compile.provenance import plan_of
from sedona_fx.compile.request import Request, read_request, request_to_load
from sedona_fx.errors import PlanError
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLosses
from sedona_fx.ir.outputs import Key, Loss
from sedona_fx.net.net import Net
from sedona_fx.plan import Plan
from sedona_fx.search import Search
from sedona_fx.search.problem.limits import Limits


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
    request = read_request(
        model=model,
        data=data,
        blocks=blocks,
        loss=loss,
        val_data=val_data,
        search=search,
        cuts=cuts,
        heads=heads,
        local_loss=local_loss,
        plan=plan,
        budget=budget,
        devices=devices,
        output=output,
        root=root,
        leaf_modules=leaf_modules,
        no_cut=no_cut,
        max_live=max_live,
        seed=seed,
        progress=progress,
        inplace=inplace,
    )
    return _make(request)


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
    request = request_to_load(
        plan=Plan.load(Path(folder) / "plan.json"),
        model=model,
        loss=loss,
        heads=heads,
        local_loss=local_loss,
        leaf_modules=leaf_modules,
        data=data,
        inplace=inplace,
    )
    net = _make(request)
    net.load_weights(Path(folder) / "weights.pt")
    return net


def _make(request: Request) -> Net:
    """Analyse the model, decide, and build: the steps that both calls have in common."""
    analysed = analyse(request.model, request.example, request.output, request.leaf_modules, request.where)
    if request.tries_loss:
        check_target(analysed, request.target, request.loss)
    if request.devices is not None and analysed.capture.hosted:
        raise PlanError(f"the code around root={request.root!r} runs as it is, on one device: leave out devices=.")
    if request.own_heads:
        analysed = with_free_heads(analysed)
    decision = decide(request, analysed)
    return build(request, analysed, decision.heads, plan_of(request, analysed, decision))
