"""ANALYSED graphs and a decision -> net."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sedona_fx import passes
from sedona_fx.compile.analyse import Analysed, uncollected
from sedona_fx.data.args import Args
from sedona_fx.errors import DataError
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.objective import LocalLoss
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.cost import block_costs, cost_of_head
from sedona_fx.ir.modules import keep_modes, share_copy
from sedona_fx.ir.outputs import Loss
from sedona_fx.net.net import Net
from sedona_fx.passes.cuts import resolve
from sedona_fx.plan import Plan


def own(model: nn.Module, *, inplace: bool) -> nn.Module:
    """Return the copy of the model that the net will own; with `inplace` it shares the tensors."""
    if not isinstance(model, nn.Module):
        raise DataError(f"decouple takes an nn.Module, not {type(model).__name__}.")
    try:
        return share_copy(model) if inplace else copy.deepcopy(model)
    except Exception as error:
        raise DataError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Drop tensors with a graph "
            "from its attributes; for torch.nn.utils.weight_norm and spectral_norm, which keep one, use those of "
            "torch.nn.utils.parametrizations."
        ) from error


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Put a model that is in eval mode as a whole into train mode meanwhile: it is searched as it will be trained.

    Where some modules train and others do not (a frozen BatchNorm), that is meant, and stays.
    """
    with keep_modes(model):
        if not any(module.training for module in model.modules()):
            model.train()
        yield


@uncollected()
def compile_net(
    model: nn.Module,
    traced: Analysed,
    example: Args,
    heads: Sequence[HeadSpec | None],
    plan: Plan,
    loss: Loss | None,
    objectives: Sequence[LocalLoss | None],
    seed: int,
) -> Net:
    """ANALYSED -> RELAXED -> PRUNED -> LOWERED -> blocks, in both modes, with fresh heads drawn from the seed."""
    devices = [torch.device(name) for name in plan.devices] if plan.devices is not None else None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    built: dict[str, list[nn.Module]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
        for cut, spec in zip(plan.cuts, heads, strict=True):
            made = [build_head(spec, traced.contexts[cut])] if spec is not None else []
            built[cut] = [head.to(like.device, like.dtype).train(model.training) for head in made]
    graphs = {True: passes.lower_at(traced.train, built, devices)}
    graphs[False] = graphs[True] if traced.eval is traced.train else passes.lower_at(traced.eval, built, devices)
    parts = {True: passes.partition(graphs[True])}
    parts[False] = parts[True] if graphs[False] is graphs[True] else passes.partition(graphs[False])
    ends = [resolve(traced.train.graph)[cut] for cut in plan.cuts]
    costs = [
        cost_of_head(traced.head_costs, spec, traced.contexts[cut], end) if spec is not None else None
        for spec, cut, end in zip(heads, plan.cuts, ends, strict=True)
    ]
    return Net(
        model,
        {True: traced.train, False: traced.eval},
        graphs,
        parts,
        [built[cut][0] if built[cut] else None for cut in plan.cuts],
        plan=plan,
        output=traced.output,
        loss=loss,
        example=example,
        costs=block_costs(traced.train, ends, costs),
        mode_paths=traced.mode_paths,
        objectives=objectives,
        seed=seed,
    )
