"""model -> ANALYSED graphs: where it may be cut, and what a head has to fit there."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx import passes
from sedona_fx.capture.state_watch import keep_state
from sedona_fx.data.args import Args
from sedona_fx.data.sources import Pair, first_examples
from sedona_fx.errors import CutError, DataError, did_you_mean, shape_text
from sedona_fx.heads.context import HeadContext
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import cut_points, info, output_node
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import Key, Loss, OutputFormat, fields, find_primary, pick
from sedona_fx.passes.crossings import read_token
from sedona_fx.passes.cuts import aliases, cut_name, is_inside, possible, start_of


@dataclass(frozen=True)
class Where:
    """Where cuts may stand.

    Attributes:
        blocks: how many blocks are wanted; as many activations may cross at a cut as it takes to have them.
        max_live: how many may cross at most; None: as few as give the blocks.
        root: module path outside of which there is no cut.
        no_cut: module paths inside of which there is none.
        named: cuts that the user names, legal however many activations cross there: a name, or a module path with
            ``"end"`` or ``"beginning"``.
    """

    blocks: int = 1
    max_live: int | None = None
    root: str = ""
    no_cut: tuple[str, ...] = ()
    named: Sequence[str | tuple[str, str]] = ()


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector: graphs are large, all alive, and gone through in vain."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@uncollected()
def analyse(
    model: nn.Module, example: Args, output: Key, leaf_modules: Collection[str], where: Where | None = None
) -> Analysed:
    """model -> TRACED -> ANALYSED, in both modes; a cut point is legal only if it is in both."""
    where = where if where is not None else Where()
    _check_paths(model, where)
    traced = passes.trace(model, example, leaf_modules=leaf_modules, root=where.root)
    memo: passes.Memo = {}  # most operations are in both graphs
    train = passes.explicit_writes(passes.annotate(traced.train, example.kwargs, training=True, memo=memo))
    values = _returned(train)
    key = find_primary(values, output)
    auxiliary: tuple[Key, ...] = ()
    passes.crossings(train, output=output, whole=traced.capture.hosted)
    if traced.eval is traced.train:
        evaluation = train
    else:
        evaluation = passes.annotate(traced.eval, example.kwargs, training=False, memo=memo)
        evaluation = passes.explicit_writes(evaluation)
        eval_values = _returned(evaluation)
        eval_key = output if output in dict(fields(eval_values)) else None
        passes.crossings(evaluation, output=eval_key, whole=traced.capture.hosted)
        auxiliary = _training_only(values, eval_values, key)
    if not any(info(node).depends for node in output_node(train.graph).all_input_nodes):
        raise CutError(
            f"the output of {type(model).__name__} does not depend on any of its parameters: there is nothing to "
            "train. Is it computed under torch.no_grad(), or from .detach()-ed values?"
        )
    named = tuple(_place(train, spec) for spec in where.named)
    if where.root and not any(info(node).crossing and is_inside(node, where.root) for node in train.graph.nodes):
        raise CutError(
            f"root={where.root!r} does not lie on the way from the inputs to the output, or holds no activation behind "
            "which a block could end. Name the module that does most of the work, a backbone or an encoder."
        )
    _choose_cuts(train, evaluation, where, named)
    token, tokens = read_token(train.graph, output)
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
            token=token if len(record.value.shape) == 3 and record.value.shape[1] == tokens else None,
        )
    # Of what the model itself returned: the graph's dicts and lists are fx's own immutable ones.
    output_format = OutputFormat.of(traced.output, key, auxiliary)
    return Analysed(
        train=train,
        eval=evaluation,
        mode_paths=traced.mode_paths,
        output=output_format,
        contexts=contexts,
        example=example,
        few=traced.output,
        named=named,
        capture=traced.capture,
    )


def _check_paths(model: nn.Module, where: Where) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for option, paths in (("root", [where.root] if where.root else []), ("no_cut", where.no_cut)):
        for path in paths:
            if not isinstance(path, str) or not path or path not in known:
                raise CutError(
                    f"{option} names {path!r}, which the model does not have{did_you_mean(str(path), known)}."
                )


def _place(train: fx.GraphModule, spec: str | tuple[str, str]) -> str:
    """Return the name of the cut point that the user means."""
    path, side = (spec, "end") if isinstance(spec, str) else spec
    if side == "end":
        return path
    known = dict(train.named_modules(remove_duplicate=False))
    if path not in known:
        raise CutError(f"cuts names the module {path!r}, which the model does not have{did_you_mean(path, known)}.")
    start = start_of(train.graph, path)
    if start is None:
        raise CutError(f"no activation that depends on parameters enters {path!r}: there is nothing to cut before it.")
    return cut_name(info(start))


def _choose_cuts(train: fx.GraphModule, evaluation: fx.GraphModule, where: Where, also: Collection[str]) -> None:
    """Offer the cut points that both modes have, with as few activations crossing as give the blocks asked for."""
    places, other = possible(train.graph), possible(evaluation.graph)
    counts = {n: max(info(node).crossing, info(other[n]).crossing) for n, node in places.items() if n in other}
    named = {name for name, node in places.items() if not set(also).isdisjoint(aliases(info(node)))}

    def choose(limit: int) -> None:
        keep = {name for name, count in counts.items() if count <= limit} | named
        for gm in (train, evaluation, train):
            passes.cuts(gm, max_live=limit, keep=keep, also=also, root=where.root, no_cut=where.no_cut)
            if train is evaluation:
                return
            keep = {str(info(node).cut) for node in cut_points(gm.graph)}

    enough = where.blocks - 1
    limits = [where.max_live] if where.max_live is not None else sorted(set(counts.values())) or [1]
    for limit in limits:
        choose(limit)
        if len(passes.base_layers(train)) >= enough:
            return
    # Blocks without a weight of their own, then: better than more activations that cross.
    for limit in limits[:-1]:
        choose(limit)
        if sum(1 for _ in cut_points(train.graph)) >= enough:
            return
    choose(limits[-1])


def check_target(traced: Analysed, target: Any, loss: Loss | None) -> None:
    """Try the loss on the model's own output for a few examples.

    Raises:
        DataError: the loss does not take the target; with both shapes.
    """
    if loss is None:
        return
    few = first_examples(target, traced.example.batch_size(), 2) if traced.capture.free_batch else target
    primary = pick(traced.few, traced.output.key)
    try:
        with torch.no_grad():
            value = traced.output.final_loss(loss, traced.few, few)
    except Exception as error:
        shape = f"{tuple(few.shape)} {few.dtype}" if isinstance(few, Tensor) else type(few).__name__
        absent = ", ".join(traced.capture.left_out)
        lacks = f" Of the output, {absent} is None, as no graph gives it." if absent else ""
        raise DataError(
            f"the loss cannot take the model's output, {tuple(primary.shape)} {primary.dtype}, with the target, "
            f"{shape} (first examples of the first batch): {type(error).__name__}: {error}. It is called as "
            f"loss(output, target); hand another with loss=..., or mend the targets.{lacks}"
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise DataError(f"loss(output, target) must return a scalar tensor, not {getattr(value, 'shape', value)!r}.")


def check_validation(model: nn.Module, traced: Analysed, pair: Pair | None, loss: Loss) -> None:
    """Try the eval graph and the loss on the first batch of ``val_data``, before a search trains for long.

    Raises:
        DataError: there is none, or the model or the loss cannot take it.
    """
    if pair is None:
        raise DataError(
            "val_data is empty: hand at least one (inputs, target) batch, or leave it out, then data is split 60/40."
        )
    given, target = pair
    names = [str(node.target) for node in traced.eval.graph.nodes if node.op == "placeholder"]
    with keep_modes(model), keep_state(model), torch.no_grad():
        model.eval()
        try:
            traced.output.final_loss(loss, traced.eval(*(given.kwargs[name] for name in names)), target)
        except Exception as error:
            shape = shape_text(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"the model or the loss cannot take the first batch of val_data, {given!r} with the target {shape}: "
                f"{type(error).__name__}: {error}. It has to be like data's, examples and all."
            ) from error


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
