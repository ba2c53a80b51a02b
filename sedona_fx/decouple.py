"""The two functions that make a net: ``decouple`` from a model, and ``load`` from what a net saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sedona_fx.compile.analyse import analyse
from sedona_fx.compile.build import build
from sedona_fx.compile.check_loss import check_target
from sedona_fx.compile.choices import Cuts, Heads, with_free_heads
from sedona_fx.compile.decide import decide
from sedona_fx.compile.provenance import plan_of
from sedona_fx.compile.request import Request, read_request, request_to_load
from sedona_fx.errors import PlanError
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLosses
from sedona_fx.ir.outputs import Key, Loss
from sedona_fx.net.net import Net
from sedona_fx.passes.trace import Dynamic
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
    dynamic: Dynamic = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> Net:
    """Cut a model into K blocks, each of which trains by a local loss without waiting for the blocks after it.

    Example::

        net = sedona_fx.decouple(model, loader, blocks=4)  # the default search chooses the cuts and the heads
        losses = net.backward(x, y).losses  # fills .grad block by block, in place of loss.backward()

    The call traces the model, runs a few examples of the first batch through model and graphs in train and in eval mode
    to prove the graphs right, chooses K-1 cuts and an auxiliary head for each, and builds the net. The choice trains
    only with a `search` that trains; its cost is given there.

    Args:
        model: any ``nn.Module``. The net owns a copy, and the model itself is not changed, unless `inplace`. Of
            ``DataParallel``, ``DistributedDataParallel`` and what ``torch.compile`` returns, it is the model inside.
        data: an iterable of (inputs, target) batches, or one such pair as a tuple. Inputs are a tuple of positional
            arguments, a mapping of keyword arguments, or else the single argument; ``sedona_fx.Args(...)`` states them
            explicitly. Tensors have the batch as their first dimension (or all of them as their second, steps first)
            and are moved to the model's device. Costs and the `budget` are those of a batch like the first. A search
            that trains iterates over the data many times and needs several batches in a ``DataLoader``, a list or
            another re-iterable; all other ways to choose the cuts read the first batch only, so that one pair is
            enough.
        blocks: number of blocks K, at least 1 (1 is backpropagation). Searches choose among the ends of base layers; if
            these are too few, the fewest other places are added, those that split the largest blocks best, and none
            that would leave a block without parameters. `cuts` and `plan` determine the number themselves, and this is
            ignored.
        loss: ``loss(output, target)``, which returns a scalar tensor. It is called with what the model returns, and
            with each head's output in the same form, where every field but the primary output is None, except for
            those that the forward computes from the inputs alone under ``torch.no_grad()``, as a momentum encoder does.
            None: no schedule can train the net, and no search that trains can choose its cuts.
        val_data: validation batches for the search, without any example of `data`. None: `data` is split 60/40, a
            map-style loader by its indices (drawn with `seed`), another re-iterable by whole batches.
        search: how cuts and heads are chosen.

            - ``"guided"``: gradients prune the candidates, short training runs decide. By default it costs as much as
              25 epochs of plain training on the data for weights (without `val_data`, 60 % of `data`).
            - ``"sedona"``: the search of the paper (Pyeon et al., ICLR 2021), by default as much as 100 epochs.
            - ``"rollout"``: short training runs of whole plans, by default as much as 25 epochs.
            - ``"balanced"``, ``"uniform"``, ``"latest"``: a rule, without training: the largest block as small as
              possible, even blocks, the last base layers.

            An instance, such as ``Sedona(unroll=1)``, sets the options of a search, its cost included.
        cuts: your own cuts, in place of a search: module paths in the order of the forward pass, a cut after each; or a
            mapping from module paths to ``"end"`` or ``"beginning"``. Such a cut is legal however many activations
            cross there.
        heads: the candidates for the auxiliary heads: registered names, or factories ``HeadContext -> nn.Module``. A
            search that trains chooses among them; a rule takes the first (``Uniform(head="largest")`` and the like: the
            largest); with `cuts`, give one per cut or one for all; with `plan`, give the factories of those of its
            heads that are not registered. None: candidates by the shapes of the activation and of the output. False: no
            heads, for schedules that need none (``Backprop``, ``Delayed``).
        local_loss: a :class:`~sedona_fx.LocalLoss`, an objective of your own in place of `loss`, for every block but
            the last, or a list with one (or None) for each of them. A search that trains compares heads by `loss` and
            cannot be combined with it.
        plan: a plan, or the path of one, that was made before. It is applied, and nothing is searched.
        budget: upper limits on what the plan may cost: ``Limits(activation_bytes=..., block_flops=...,
            block_seconds=..., head_flops=...)`` (bytes, FLOPs and seconds of the largest block; FLOPs of all heads
            together), any of them, or a mapping with these keys. A search returns its best plan within them; `cuts` or
            a `plan` that exceed them are refused. ``block_seconds`` is measured on this machine, unless `plan` holds
            the measurements of an earlier decision.
        devices: one device per block, to which its tensors are moved; blocks on different devices cannot share a
            parameter. None: those of `plan`, else the model's device for all.
        output: key, attribute or index (-1 is the last) of the primary output, the one that heads imitate, or a path
            to a field of a field (``"one2many.boxes"``). None: ``logits``, else the only or first float tensor.
        root: module path of the part that is cut; the code around it belongs to the first and to the last block. If
            that code cannot be traced, it runs as Python, on one device, and what it does before `root` runs twice per
            step.
        leaf_modules: module paths that are kept whole while tracing, with no cut inside. Modules whose own code decides
            by numbers in tensors, or by random numbers that it draws, stay whole by themselves; it is logged which.
        no_cut: module paths inside of which there is no cut; they are traced as usual.
        max_live: how many activations may cross at a cut, at least 1. Each one is held until the last block that reads
            it has run; more allow cuts inside of residual blocks and past the skips of a U-Net. None: as few as give
            the number of blocks, if balanced cuts make the largest at most 1.3 times an even share; else as few as make
            it at most 1.1 times the smallest that any number allows.
        dynamic: sizes of inputs that must not be fixed, besides the batch: ``{"ids": [1]}`` for sequences of any
            length. In models that only ``torch.export`` can record, sizes are free where the program and the heads
            allow it (``print(net)`` lists them); a size that is named here and cannot be free is an error, with the
            line that fixes it. False: all are fixed, which compiles faster.
        seed: seeds the search, the initial weights of the heads, and the random draws of the blocks in training.
        progress: whether a search shows progress bars.
        inplace: share the model's Parameter objects and buffers instead of copying them. That saves the memory of the
            copy, and training the net trains the model.

    Returns:
        The net, in the model's mode. ``print(net)`` shows its blocks with their costs, and which of them is largest; if
        it has more than 1.5 times an even share, why, and what would help. ``net.plan`` is the decision.

    Raises:
        SedonaError: bad input of any kind. Its subclass says which (:mod:`sedona_fx.errors`), its message the place in
            the model and what to do next.
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
        dynamic=dynamic,
        seed=seed,
        progress=progress,
        inplace=inplace,
    )
    return _make(request)


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    loss: Loss | Literal["saved"] | None = "saved",
    heads: Sequence[HeadSpec] = (),
    local_loss: LocalLosses = None,
    leaf_modules: Collection[str] = (),
    data: Any = None,
    inplace: bool = False,
) -> Net:
    """Rebuild a net from what ``net.save(folder)`` wrote and a model of the same architecture.

    Args:
        folder: the folder, with ``plan.json`` and ``weights.pt``.
        model: a model of the same architecture. Its own weights are not used.
        loss: as in :func:`decouple`. ``"saved"`` is the one that the plan names, if it is one of PyTorch's with its
            default settings (a plan from before losses were named: cross-entropy). Other functions are not saved, so
            that they have to be given again; one of another name than the saved one, or None, is warned of.
        heads: the factories of the heads that are not registered by name.
        local_loss: as in :func:`decouple`. If the net had any, they have to be given again.
        leaf_modules: as in :func:`decouple`.
        data: as in :func:`decouple`. None: the model is traced with noise in the shapes of the saved inputs; give data
            if it cannot run on that.
        inplace: share the model's Parameter objects instead of copying them; the saved weights are loaded into them.

    Returns:
        The net, in the model's mode, with the saved weights and number of training steps.

    Raises:
        PlanError: the plan cannot be read, does not fit the model, or names a loss that has to be given.
        CheckpointError: the weights cannot be read, or do not fit the net.
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
    """Analyse the model, decide, and build: the steps that both functions have in common."""
    analysed = analyse(
        request.model,
        request.example,
        request.output,
        request.leaf_modules,
        where=request.where,
        dynamic=request.dynamic,
    )
    if request.tries_loss:
        heads, searching = request.trains_heads, request.searches
        check_target(request.model, analysed, request.target, request.loss, heads=heads, searching=searching)
    if request.devices is not None and analysed.capture.hosted:
        raise PlanError(f"the code around root={request.root!r} runs as it is, on one device: leave out devices=.")
    if request.own_heads:
        analysed = with_free_heads(analysed)
    decision = decide(request, analysed)
    return build(request, analysed, decision.heads, plan_of(request, analysed, decision))
