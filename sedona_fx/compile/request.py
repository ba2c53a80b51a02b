"""What the user asked of ``decouple`` or ``load``: the arguments checked one by one, and kept in one record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sedona_fx.compile.arguments import device_names, dynamic_of, given_plan, search_of
from sedona_fx.compile.choices import Cuts, Heads, named_cuts
from sedona_fx.compile.copying import owned_copy
from sedona_fx.compile.saved_loss import check_objectives, loss_to_load
from sedona_fx.compile.where import Where
from sedona_fx.data.args import Args
from sedona_fx.data.sources import first_pair, to_device
from sedona_fx.errors import CutError, DataError
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLoss, LocalLosses, one_a_block
from sedona_fx.ir.modules import device_of
from sedona_fx.ir.outputs import Key, Loss
from sedona_fx.ir.stretches.shares import Measure
from sedona_fx.net.signature import example_like
from sedona_fx.passes.trace import Dynamic
from sedona_fx.plan import Plan
from sedona_fx.search import Balanced, Search
from sedona_fx.search.problem.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that was asked for, with every default filled in. Made by :func:`read_request`.

    Attributes:
        model: the copy that the net will own.
        example: the inputs of the first batch, each under its argument name, on the model's device.
        target: the target of that batch, on the model's device.
        tries_loss: whether to try the loss on that batch; False for a net that is loaded, which has no batch to try it
            on.
        blocks: number of blocks K.
        loss: ``loss(output, target)``, or None.
        data, val_data: what the search reads, as the user passed it.
        search: the search that chooses unless `plan` or `cuts` do.
        search_name: that search as the user wrote it, for messages.
        cuts: the user's own cuts as (module path, ``"end"`` or ``"beginning"``), or None.
        heads: the user's candidates.
        objectives: for each block but the last the user's own objective, or None for the model's loss.
        plan: the plan to apply, or None.
        limits: what the plan may cost; None: anything.
        devices: one device name for each block. None: all blocks are on the model's device.
        output: key of the primary output; None: by rule.
        root, leaf_modules, no_cut, max_live, dynamic, seed, progress: as in :func:`sedona_fx.decouple`.
    """

    model: nn.Module
    example: Args
    target: Any
    tries_loss: bool
    blocks: int
    loss: Loss | None
    data: Any
    val_data: Any
    search: Search
    search_name: str
    cuts: list[tuple[str, str]] | None
    heads: Heads
    objectives: list[LocalLoss | None]
    plan: Plan | None
    limits: Limits | None
    devices: tuple[str, ...] | None
    output: Key
    root: str
    leaf_modules: Collection[str]
    no_cut: tuple[str, ...]
    max_live: int | None
    seed: int
    progress: bool
    dynamic: Dynamic = None

    @property
    def own_heads(self) -> list[HeadSpec]:
        """The heads of the user's own objectives."""
        return [objective.head for objective in self.objectives if objective is not None]

    @property
    def where(self) -> Where:
        """Where the user allows cuts."""
        named = self.plan.cuts if self.plan is not None else self.cuts or ()
        return Where(
            self.blocks,
            self.max_live,
            root=self.root,
            no_cut=self.no_cut,
            named=tuple(named),
            measure=self.measure,
            default_heads=(self.heads is None or self.heads is True) and not self.own_heads,
        )

    @property
    def measure(self) -> Measure | None:
        """What the blocks should share evenly; None: their cuts are named."""
        if self.plan is not None or self.cuts is not None:
            return None
        limits = self.limits.given() if self.limits is not None else {}
        in_bytes = "activation_bytes" in limits and "block_flops" not in limits
        return "activation_bytes" if in_bytes else self.search.balances

    @property
    def trains_heads(self) -> bool:
        """Whether some head is to be trained by the model's own loss."""
        no_heads = self.heads is False or (self.plan is not None and not any(self.plan.heads))
        return self.blocks > 1 and not no_heads and None in self.objectives

    @property
    def searches(self) -> bool:
        """Whether a search that reads data chooses the cuts."""
        return self.plan is None and self.cuts is None and self.search.needs_data and self.blocks > 1


def read_request(
    *,
    model: nn.Module,
    data: Any,
    blocks: int,
    loss: Loss | None,
    val_data: Any,
    search: str | Search,
    cuts: Cuts,
    heads: Heads,
    local_loss: LocalLosses,
    plan: Plan | str | Path | None,
    budget: Limits | Mapping[str, Any] | None,
    devices: Sequence[str | torch.device] | None,
    output: Key,
    root: str,
    leaf_modules: Collection[str],
    no_cut: Collection[str],
    max_live: int | None,
    dynamic: Dynamic,
    seed: int,
    progress: bool,
    inplace: bool,
) -> Request:
    """Check the arguments of :func:`sedona_fx.decouple` one by one, and derive those that follow from others.

    Raises:
        SedonaError: an argument is wrong whatever the model's graph looks like.
    """
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise CutError(f"blocks={blocks!r}: give a whole number, at least 1 (1 is backpropagation).")
    if max_live is not None and (isinstance(max_live, bool) or not isinstance(max_live, int) or max_live < 1):
        raise CutError(f"max_live={max_live!r}: give a whole number of activations, at least 1, or leave it out.")
    if loss is not None and not callable(loss):
        raise DataError(f"loss={loss!r} cannot be called: give a function loss(output, target) or None.")
    search_object = search_of(search)
    plan = given_plan(plan)
    limits = Limits.of(budget, plan)
    cut_specs = named_cuts(cuts)
    if plan is not None:
        blocks, devices = plan.blocks, devices if devices is not None else plan.devices
        max_live = max_live if max_live is not None else plan.max_live
        output, root = output if output is not None else plan.output, root or plan.root
    elif cut_specs is not None:
        blocks = len(cut_specs) + 1
    names = device_names(devices, blocks)
    owned = owned_copy(model, inplace=inplace)
    device = device_of(owned)
    inputs, target = first_pair(data)
    example = Args(**to_device(inputs.bind(owned.forward), device))
    return Request(
        model=owned,
        example=example,
        target=to_device(target, device),
        tries_loss=True,
        blocks=blocks,
        loss=loss,
        data=data,
        val_data=val_data,
        search=search_object,
        search_name=repr(search),
        cuts=cut_specs,
        heads=heads,
        objectives=one_a_block(local_loss, blocks),
        plan=plan,
        limits=limits,
        devices=names,
        output=output,
        root=root,
        leaf_modules=(leaf_modules,) if isinstance(leaf_modules, str) else tuple(leaf_modules),
        no_cut=(no_cut,) if isinstance(no_cut, str) else tuple(no_cut),
        max_live=max_live,
        dynamic=dynamic_of(dynamic, example),
        seed=seed,
        progress=progress,
    )


def request_to_load(
    *,
    plan: Plan,
    model: nn.Module,
    loss: Loss | Literal["saved"] | None,
    heads: Heads,
    local_loss: LocalLosses,
    leaf_modules: Collection[str],
    data: Any,
    inplace: bool,
) -> Request:
    """Return the request of :func:`sedona_fx.load`: the saved plan, on a model whose own weights do not matter.

    The saved weights fit the graphs whatever the first batch is. So without `data` the example is noise in the shapes
    of the plan's inputs; the loss is not tried.

    Raises:
        PlanError: the plan names a loss that has to be given again, or devices that are not there.
    """
    objectives = one_a_block(local_loss, plan.blocks)
    check_objectives(plan, objectives)
    loss = loss_to_load(plan, loss)
    owned = owned_copy(model, inplace=inplace)
    device = device_of(owned)
    if data is None:
        example = example_like(plan.inputs, device)
    else:
        example = Args(**to_device(first_pair(data)[0].bind(owned.forward), device))
    return Request(
        model=owned,
        example=example,
        target=None,
        tries_loss=False,
        blocks=plan.blocks,
        loss=loss,
        data=None,
        val_data=None,
        search=Balanced(),
        search_name="None",
        cuts=None,
        heads=heads,
        objectives=objectives,
        plan=plan,
        limits=None,
        devices=device_names(plan.devices, plan.blocks),
        output=plan.output,
        root=plan.root,
        leaf_modules=(leaf_modules,) if isinstance(leaf_modules, str) else tuple(leaf_modules),
        no_cut=(),
        max_live=plan.max_live,
        seed=plan.seed,
        progress=False,
    )
