"""The two halves around a decision: model -> ANALYSED graphs, and ANALYSED graphs + decision -> net."""

from __future__ import annotations

import copy
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx import passes
from sedona_fx.args import Args
from sedona_fx.cost import block_costs, head_cost
from sedona_fx.data import first_examples
from sedona_fx.errors import DataError
from sedona_fx.graph import cut_points, info, output_node
from sedona_fx.heads import HeadContext, build_head
from sedona_fx.net import Net, share_copy
from sedona_fx.outputs import Key, OutputFormat, fields, find_primary, pick
from sedona_fx.passes.cuts import resolve
from sedona_fx.plan import Plan
from sedona_fx.search.problem import HeadSpec
from sedona_fx.train.engine import Loss


@dataclass(frozen=True)
class Analysed:
    """A model's ANALYSED graphs (one object where the modes do not differ) and what was learned about its output.

    ``contexts`` says for every legal cut point what a head has to fit; ``few`` is what the model returned in train mode
    for the first two examples.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: OutputFormat
    contexts: dict[str, HeadContext]
    few: Any


def own(model: nn.Module, *, inplace: bool) -> nn.Module:
    """Return the copy of the model that the net will own; with `inplace` it shares the tensors."""
    if not isinstance(model, nn.Module):
        raise DataError(f"decouple takes an nn.Module, not {type(model).__name__}.")
    if inplace:
        return share_copy(model)
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise DataError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass inplace=True to share "
            "its parameters, or drop tensors with a graph from its attributes."
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first tensor."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector: graphs are large, all alive, and gone through in vain."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@_uncollected()
def analyse(model: nn.Module, example: Args, output: Key, leaf_modules: Collection[str]) -> Analysed:
    """model -> TRACED -> ANALYSED, in both modes; a cut point is legal only if it is in both."""
    traced = passes.trace(model, example, leaf_modules=leaf_modules)
    train = passes.explicit_writes(passes.annotate(traced.train, example.kwargs, training=True))
    values = _returned(train)
    key = find_primary(values, output)
    auxiliary: tuple[Key, ...] = ()
    if traced.eval is traced.train:
        evaluation = train
        passes.cuts(train, output=output)
    else:
        evaluation = passes.explicit_writes(passes.annotate(traced.eval, example.kwargs, training=False))
        eval_values = _returned(evaluation)
        eval_key = output if output in dict(fields(eval_values)) else None
        find_primary(eval_values, eval_key)
        passes.cuts(evaluation, output=eval_key)
        passes.cuts(train, output=output, keep=_names(evaluation))
        passes.cuts(evaluation, output=eval_key, keep=_names(train))
        auxiliary = _training_only(values, eval_values, key)
    contexts = {}
    for node in cut_points(train.graph):
        record = info(node)
        rank = len(record.value.shape)
        contexts[str(record.cut)] = HeadContext(
            shape=record.value.shape,
            output_shape=pick(values, key).shape,
            # Where no layer says otherwise, the channels of three dimensions are the last, as tokens have them.
            channel_dim=record.channel_dim if record.channel_dim is not None else (2 if rank == 3 else 1),
            place=str(record.cut),
        )
    # Of what the model itself returned: the graph's dicts and lists are fx's own immutable ones.
    output_format = OutputFormat.of(traced.output, key, auxiliary)
    return Analysed(train, evaluation, traced.mode_paths, output_format, contexts, traced.output)


def check_target(traced: Analysed, example: Args, target: Any, loss: Loss | None) -> None:
    """Try the loss on the model's own output for a few examples.

    Raises:
        DataError: the loss does not take the target; with both shapes.
    """
    if loss is None:
        return
    few = first_examples(target, example.batch_size(), 2)
    primary = pick(traced.few, traced.output.key)
    try:
        with torch.no_grad():
            value = traced.output.final_loss(loss, traced.few, few)
    except Exception as error:
        shape = f"{tuple(few.shape)} {few.dtype}" if isinstance(few, Tensor) else type(few).__name__
        raise DataError(
            f"the loss cannot take the model's output, {tuple(primary.shape)} {primary.dtype}, with the target, "
            f"{shape} (first examples of the first batch): {type(error).__name__}: {error}. It is called as "
            "loss(output, target); hand another with loss=..., or mend the targets."
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise DataError(f"loss(output, target) must return a scalar tensor, not {getattr(value, 'shape', value)!r}.")


@_uncollected()
def compile_net(
    model: nn.Module,
    traced: Analysed,
    example: Args,
    heads: Sequence[HeadSpec | None],
    plan: Plan,
    loss: Loss | None,
    seed: int,
) -> Net:
    """ANALYSED -> RELAXED -> PRUNED -> LOWERED -> blocks, in both modes, with fresh heads drawn from the seed."""
    devices = [torch.device(name) for name in plan.devices] if plan.devices is not None else None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    built: dict[str, list[nn.Module]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for cut, spec in zip(plan.cuts, heads, strict=True):
            made = [build_head(spec, traced.contexts[cut])] if spec is not None else []
            built[cut] = [head.to(like.device, like.dtype).train(model.training) for head in made]
    graphs = {True: _lower(traced.train, built, devices)}
    graphs[False] = graphs[True] if traced.eval is traced.train else _lower(traced.eval, built, devices)
    parts = {True: passes.partition(graphs[True])}
    parts[False] = parts[True] if graphs[False] is graphs[True] else passes.partition(graphs[False])
    if devices is not None:
        for block, device in zip(parts[True], devices, strict=True):
            block.module.to(device)
    ends = [resolve(traced.train.graph)[cut] for cut in plan.cuts]
    costs = [
        head_cost(lambda spec=spec, cut=cut: build_head(spec, traced.contexts[cut]), info(end).value)  # type: ignore[misc]
        if spec is not None
        else None
        for spec, cut, end in zip(heads, plan.cuts, ends, strict=True)
    ]
    return Net(
        model,
        graphs,
        parts,
        [built[cut][0] if built[cut] else None for cut in plan.cuts],
        plan=plan,
        output=traced.output,
        loss=loss,
        example=example,
        costs=block_costs(traced.train, ends, costs),
        mode_paths=traced.mode_paths,
        seed=seed,
    )


def _lower(
    gm: fx.GraphModule, heads: dict[str, list[nn.Module]], devices: Sequence[torch.device] | None
) -> fx.GraphModule:
    relaxed = passes.relax(gm, heads)
    return passes.lower(passes.prune(relaxed, dict.fromkeys(heads, 0)), devices)


def _names(gm: fx.GraphModule) -> set[str]:
    return {str(info(node).cut) for node in cut_points(gm.graph)}


def _returned(gm: fx.GraphModule) -> Any:
    """Return what a graph returns, every tensor replaced by its spec."""
    (result,) = output_node(gm.graph).args
    return pytree.tree_map(lambda n: info(n).value if isinstance(n, fx.Node) else n, result)


def _training_only(values: Any, eval_values: Any, key: Key) -> tuple[Key, ...]:
    """Return the fields of the train output that look like the primary one and that evaluation does not return."""
    shape = pick(values, key).shape
    kept = dict(fields(eval_values))
    return tuple(
        name
        for name, value in fields(values)
        if name != key and getattr(value, "shape", None) == shape and kept.get(name) is None
    )
