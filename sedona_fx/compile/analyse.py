"""model -> ANALYSED graphs: where the model may be cut, and what a head has to fit there."""

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
from sedona_fx.compile.head_loss import check_head_output
from sedona_fx.data.args import Args
from sedona_fx.data.sources import Pair, first_examples
from sedona_fx.errors import CutError, DataError, did_you_mean, shape_text
from sedona_fx.heads.context import HeadContext, HeadDtypes
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import TensorSpec, cut_points, info, output_node
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import Key, Loss, OutputFormat, fields, find_primary, pick, resolve_key
from sedona_fx.passes.crossings import read_token
from sedona_fx.passes.cuts import aliases, cut_name, is_inside, possible, start_of

_PATHS = "model.named_modules() lists the module paths."


@dataclass(frozen=True)
class Where:
    """Where the user allows cuts.

    Attributes:
        blocks: number of blocks wanted.
        max_live: how many activations may cross at a cut. None: as few as give the number of blocks.
        root: module path outside of which there is no cut; empty for the whole model.
        no_cut: module paths inside of which there is no cut.
        named: cuts that the user names, which are legal however many activations cross there: a name, or a module path
            with ``"end"`` or ``"beginning"``.
    """

    blocks: int = 1
    max_live: int | None = None
    root: str = ""
    no_cut: tuple[str, ...] = ()
    named: Sequence[str | tuple[str, str]] = ()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would only search large graphs that are all in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@gc_paused()
def analyse(
    model: nn.Module, example: Args, output: Key, leaf_modules: Collection[str], where: Where | None = None
) -> Analysed:
    """model -> TRACED -> ANALYSED, in train and in eval mode. A cut point is legal only if both graphs have it.

    Args:
        model: the copy that the net will own.
        example: one batch, every input under its argument name.
        output: the user's key of the primary output; None: by rule.
        leaf_modules: module paths that are kept whole while tracing.
        where: where the user allows cuts; None: everywhere.

    Raises:
        TraceError: the forward cannot be turned into a graph.
        OutputError: there is no such primary output.
        CutError: a path is not in the model, or nothing depends on parameters.
    """
    where = where if where is not None else Where()
    _check_paths(model, where)
    traced = passes.trace(model, example, leaf_modules=leaf_modules, root=where.root)
    memo: passes.Memo = {}  # shared, since most operations are in both graphs
    train = passes.annotate(traced.train, example.kwargs, training=True, memo=memo)
    train = passes.explicit_writes(passes.derivative_inputs(train))
    returned = _returned_specs(train)
    key = find_primary(returned, output)
    auxiliary: tuple[Key, ...] = ()
    passes.crossings(train, output=output, whole=traced.capture.hosted)
    if traced.eval is traced.train:
        evaluation = train
    else:
        evaluation = passes.annotate(traced.eval, example.kwargs, training=False, memo=memo)
        evaluation = passes.explicit_writes(passes.derivative_inputs(evaluation))
        eval_returned = _returned_specs(evaluation)
        eval_key = resolve_key(eval_returned, output)
        eval_key = eval_key if eval_key in dict(fields(eval_returned)) else None
        passes.crossings(evaluation, output=eval_key, whole=traced.capture.hosted)
        auxiliary = _auxiliary_fields(returned, eval_returned, key)
    if not any(info(node).depends for node in output_node(train.graph).all_input_nodes):
        raise CutError(
            f"the output of {type(model).__name__} does not depend on any of its parameters: there is nothing to "
            "train. Is it computed under torch.no_grad(), or from .detach()-ed values?"
        )
    named = tuple(_cut_point(train, spec) for spec in where.named)
    if where.root and not any(info(node).crossing and is_inside(node, where.root) for node in train.graph.nodes):
        raise CutError(
            f"root={where.root!r} does not lie on the way from the inputs to the output, or holds no activation behind "
            "which a block could end. Name the module that does most of the work, a backbone or an encoder."
        )
    _choose_cuts(train, evaluation, where, named)
    return Analysed(
        train=train,
        eval=evaluation,
        mode_paths=traced.mode_paths,
        # From what the model itself returned, since dicts and lists in a graph are immutable classes of fx.
        output=OutputFormat.of(traced.output, key, auxiliary),
        contexts=_head_contexts(train, output, pick(returned, key)),
        example=example,
        few=traced.output,
        named=named,
        capture=traced.capture,
    )


def _check_paths(model: nn.Module, where: Where) -> None:
    """Raise :class:`CutError` if ``root`` or ``no_cut`` names a module that the model does not have."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for option, paths in (("root", [where.root] if where.root else []), ("no_cut", where.no_cut)):
        for path in paths:
            if not isinstance(path, str) or not path or path not in modules:
                near = did_you_mean(str(path), modules)
                raise CutError(f"{option} names {path!r}, which the model does not have{near}. {_PATHS}")


def _cut_point(train: fx.GraphModule, spec: str | tuple[str, str]) -> str:
    """Return the name of the cut point that the user means by a name, or by a module path and a side."""
    path, side = (spec, "end") if isinstance(spec, str) else spec
    if side == "end":
        return path
    modules = dict(train.named_modules(remove_duplicate=False))
    if path not in modules:
        near = did_you_mean(path, modules)
        raise CutError(f"cuts names the module {path!r}, which the model does not have{near}. {_PATHS}")
    start = start_of(train.graph, path)
    if start is None:
        raise CutError(
            f"no activation that depends on parameters enters {path!r}: there is nothing to cut before it. Name a "
            "later module."
        )
    return cut_name(info(start))


def _choose_cuts(train: fx.GraphModule, evaluation: fx.GraphModule, where: Where, also: Collection[str]) -> None:
    """Mark the legal cut points in both graphs: the same in both, at as few crossing activations as give the blocks.

    Base layers count first. Only if no number of crossing activations gives enough of them, all cut points count.

    Args:
        train: the train graph with crossings counted. Only records change.
        evaluation: the eval graph, or `train` itself if the modes do not differ.
        where: where the user allows cuts.
        also: names of cut points that are legal however many activations cross there.
    """
    in_train, in_eval = possible(train.graph), possible(evaluation.graph)
    crossing = {
        name: max(info(node).crossing, info(in_eval[name]).crossing)
        for name, node in in_train.items()
        if name in in_eval
    }
    named = {name for name, node in in_train.items() if not set(also).isdisjoint(aliases(info(node)))}

    def mark(limit: int) -> None:
        keep = {name for name, count in crossing.items() if count <= limit} | named
        # What one graph drops, the other one has to drop as well; train comes again for what eval dropped.
        for gm in (train, evaluation, train):
            passes.cuts(gm, max_live=limit, keep=keep, also=also, root=where.root, no_cut=where.no_cut)
            if train is evaluation:
                return
            keep = {str(info(node).cut) for node in cut_points(gm.graph)}

    cuts_wanted = where.blocks - 1
    limits = [where.max_live] if where.max_live is not None else sorted(set(crossing.values())) or [1]
    for limit in limits:
        mark(limit)
        if len(passes.base_layers(train)) >= cuts_wanted:
            return
    # Now blocks without a weight of their own are allowed, before more activations may cross.
    for limit in limits[:-1]:
        mark(limit)
        if sum(1 for _ in cut_points(train.graph)) >= cuts_wanted:
            return
    mark(limits[-1])


def _head_contexts(train: fx.GraphModule, output: Key, primary: TensorSpec) -> dict[str, HeadContext]:
    """Return what a head has to fit at every legal cut point."""
    token, tokens = read_token(train.graph, output)
    contexts = {}
    for node in cut_points(train.graph):
        record = info(node)
        shape = record.value.shape
        contexts[str(record.cut)] = HeadContext(
            shape=shape,
            output_shape=primary.shape,
            # If no layer says otherwise, the last of three dimensions holds the channels, as in tokens.
            channel_dim=record.channel_dim if record.channel_dim is not None else (2 if len(shape) == 3 else 1),
            place=str(record.cut),
            token=token if len(shape) == 3 and shape[1] == tokens else None,
            dtypes=_head_dtypes(train, record.value, primary),
        )
    return contexts


def _head_dtypes(train: fx.GraphModule, activation: TensorSpec, primary: TensorSpec) -> HeadDtypes | None:
    """Return the dtypes of a head: its weights have the activation's if the model has such weights, too.

    Otherwise autocast has made the activation, which no weights of that dtype could follow to another autocast.
    """
    dtypes = [p.dtype for p in train.parameters() if p.is_floating_point()]
    one = len({*dtypes, activation.dtype, primary.dtype}) <= 1
    if activation.dtype.is_complex:
        return HeadDtypes(
            activation.dtype, weights=dtypes[0] if dtypes else activation.dtype.to_real(), output=primary.dtype
        )
    if one or not activation.dtype.is_floating_point or torch.is_autocast_enabled(primary.device.type):
        return None
    weights = activation.dtype if activation.dtype in dtypes or not dtypes else dtypes[0]
    return HeadDtypes(activation=activation.dtype, weights=weights, output=primary.dtype)


def check_target(traced: Analysed, target: Any, loss: Loss | None, *, heads: bool = False) -> None:
    """Try the loss on the model's own output for a few examples, and on a head's, before anything is searched.

    Args:
        traced: what analysis found out about the model.
        target: target of the example batch.
        loss: ``loss(output, target)``; None: nothing is checked.
        heads: whether heads are to be trained by this loss.

    Raises:
        DataError: the loss does not take the target (with both shapes), does not return a scalar tensor, or reads
            fields of the output that a head does not give (with their names).
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
        left_out = ", ".join(traced.capture.left_out)
        missing = f" Of the output, {left_out} is None, as no graph gives it." if left_out else ""
        raise DataError(
            f"the loss cannot take the model's output, {tuple(primary.shape)} {primary.dtype}, with the target, "
            f"{shape} (first examples of the first batch): {type(error).__name__}: {error}. It is called as "
            f"loss(output, target); hand another with loss=..., or mend the targets.{missing}"
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise DataError(
            f"loss(output, target) must return a scalar tensor, not {getattr(value, 'shape', value)!r}. Return the "
            "mean over the batch, as a tensor."
        )
    if heads and not traced.output.bare and primary.dim():  # no head imitates a single number, as will be said
        check_head_output(traced, few, loss)


def check_validation(model: nn.Module, traced: Analysed, pair: Pair | None, loss: Loss) -> None:
    """Try the eval graph and the loss on the first batch of ``val_data``, before a search trains for long.

    Args:
        model: the model whose modules the graph runs; its modes and state are as before afterwards.
        traced: what analysis found out about it.
        pair: the first batch on the model's device, or None if there is none.
        loss: ``loss(output, target)``.

    Raises:
        DataError: there is no batch, or the model or the loss cannot take it.
    """
    if pair is None:
        raise DataError(
            "val_data is empty: hand at least one (inputs, target) batch, or leave it out, then data is split 60/40."
        )
    inputs, target = pair
    names = [str(node.target) for node in traced.eval.graph.nodes if node.op == "placeholder"]
    with keep_modes(model), keep_state(model), torch.no_grad():
        model.eval()
        try:
            traced.output.final_loss(loss, traced.eval(*(inputs.kwargs[name] for name in names)), target)
        except Exception as error:
            shape = shape_text(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"the model or the loss cannot take the first batch of val_data, {inputs!r} with the target {shape}: "
                f"{type(error).__name__}: {error}. It has to be like data's, examples and all."
            ) from error


def _returned_specs(gm: fx.GraphModule) -> Any:
    """Return what a graph returns, with a :class:`~sedona_fx.ir.graph.TensorSpec` in place of every tensor."""
    (result,) = output_node(gm.graph).args
    return pytree.tree_map(lambda n: info(n).value if isinstance(n, fx.Node) else n, result)


def _auxiliary_fields(returned: Any, eval_returned: Any, key: Key) -> tuple[Key, ...]:
    """Return the fields in the shape of the primary output that are returned in train mode only (GoogLeNet has two)."""
    shape = pick(returned, key).shape
    in_eval = dict(fields(eval_returned))
    return tuple(
        name
        for name, value in fields(returned)
        if name != key and getattr(value, "shape", None) == shape and in_eval.get(name) is None
    )
