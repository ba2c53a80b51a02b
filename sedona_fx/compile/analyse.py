"""model -> ANALYSED graphs: where the model may be cut, and what a head has to fit there."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx import passes
from sedona_fx.compile.crossing_limit import mark_cuts
from sedona_fx.compile.where import Where
from sedona_fx.data.args import Args
from sedona_fx.errors import CutError, HeadError, did_you_mean
from sedona_fx.heads.context import HeadContext, HeadDtypes
from sedona_fx.heads.registry import default_candidates
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import TensorSpec, cut_points, info, output_node
from sedona_fx.ir.outputs import Key, OutputFormat, fields, find_primary, pick, resolve_key
from sedona_fx.passes.crossings import read_token
from sedona_fx.passes.cuts import cut_name, is_inside, possible, start_of

_PATHS = "model.named_modules() lists the module paths."


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
    train = passes.explicit_writes(passes.annotate(traced.train, example.kwargs, training=True, memo=memo))
    returned = _returned_specs(train)
    key = find_primary(returned, output)
    auxiliary: tuple[Key, ...] = ()
    passes.crossings(train, output=output, whole=traced.capture.hosted)
    if traced.eval is traced.train:
        evaluation = train
    else:
        evaluation = passes.annotate(traced.eval, example.kwargs, training=False, memo=memo)
        evaluation = passes.explicit_writes(evaluation)
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
    context_of = _context_of(train, output, pick(returned, key))
    offered = mark_cuts(train, evaluation, where, named=named, fits=_fits(train, where, context_of))
    return Analysed(
        train=train,
        eval=evaluation,
        mode_paths=traced.mode_paths,
        # From what the model itself returned, since dicts and lists in a graph are immutable classes of fx.
        output=OutputFormat.of(traced.output, key, auxiliary),
        contexts={str(info(node).cut): context_of(node) for node in cut_points(train.graph)},
        example=example,
        few=traced.output,
        offered=offered,
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


def _context_of(train: fx.GraphModule, output: Key, primary: TensorSpec) -> Callable[[fx.Node], HeadContext]:
    """Return the function that says what a head has to fit behind a node."""
    token, tokens = read_token(train.graph, output)
    weights = list(dict.fromkeys(p.dtype for p in train.parameters() if p.is_floating_point()))

    @functools.cache
    def context_of(node: fx.Node) -> HeadContext:
        record = info(node)
        shape = record.value.shape
        return HeadContext(
            shape=shape,
            output_shape=primary.shape,
            # If no layer says otherwise, the last of three dimensions holds the channels, as in tokens.
            channel_dim=record.channel_dim if record.channel_dim is not None else (2 if len(shape) == 3 else 1),
            place=cut_name(record),
            token=token if len(shape) == 3 and shape[1] == tokens else None,
            dtypes=_head_dtypes(weights, record.value, primary),
        )

    return context_of


def _fits(
    train: fx.GraphModule, where: Where, context_of: Callable[[fx.Node], HeadContext]
) -> Callable[[fx.Node], bool]:
    """Return the function that says whether the head that a block gets can stand behind a node.

    Where none can stand anywhere, that will be said later, and no place is worse than another.
    """

    @functools.cache
    def fits(node: fx.Node) -> bool:
        try:
            default_candidates(context_of(node))
        except HeadError:
            return False
        return True

    asked = where.default_heads and where.measure is not None
    if not asked or not any(map(fits, possible(train.graph).values())):
        return lambda node: True
    return fits


def _head_dtypes(dtypes: Sequence[torch.dtype], activation: TensorSpec, primary: TensorSpec) -> HeadDtypes | None:
    """Return the dtypes of a head: its weights have the activation's if the model has such weights, too.

    Otherwise autocast has made the activation, which no weights of that dtype could follow to another autocast.

    Args:
        dtypes: of the model's weights, in their order.
        activation, primary: what the head reads, and what it imitates.
    """
    one = len({*dtypes, activation.dtype, primary.dtype}) <= 1
    if one or not activation.dtype.is_floating_point or torch.is_autocast_enabled(primary.device.type):
        return None
    weights = activation.dtype if activation.dtype in dtypes or not dtypes else dtypes[0]
    return HeadDtypes(activation=activation.dtype, weights=weights, output=primary.dtype)


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
