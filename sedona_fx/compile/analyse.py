"""model -> ANALYSED graphs: where the model may be cut, and what a head has to fit there."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx import passes
from sedona_fx.compile.contexts import context_of
from sedona_fx.compile.crossing_limit import mark_cuts
from sedona_fx.compile.given_fields import mark_given_fields
from sedona_fx.compile.where import Where
from sedona_fx.compile.whole_batch import repeated_to
from sedona_fx.data.args import Args
from sedona_fx.errors import CutError, HeadError, did_you_mean
from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.registry import default_candidates
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import cut_points, info, output_node
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.outputs import Key, Step, fields, find_primary, has_field, pick, resolve_key
from sedona_fx.passes.crossings import loss_node
from sedona_fx.passes.cuts import cut_name, is_inside, possible, start_of
from sedona_fx.passes.trace import Dynamic
from sedona_fx.rng import in_turn

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


@in_turn
@gc_paused()
def analyse(
    model: nn.Module,
    example: Args,
    output: Key,
    leaf_modules: Collection[str],
    where: Where | None = None,
    dynamic: Dynamic = None,
) -> Analysed:
    """model -> TRACED -> ANALYSED, in train and in eval mode. A cut point is legal only if both graphs have it.

    Args:
        model: the copy that the net will own.
        example: one batch, every input under its argument name.
        output: the user's key of the primary output; None: by rule.
        leaf_modules: module paths that are kept whole while tracing.
        where: where the user allows cuts; None: everywhere.
        dynamic: as for :func:`~sedona_fx.passes.trace.trace`.

    Raises:
        TraceError: the forward cannot be turned into a graph.
        OutputError: there is no such primary output.
        CutError: a path is not in the model, or nothing depends on parameters.
    """
    where = where if where is not None else Where()
    _check_paths(model, where)
    traced = passes.trace(model, example, leaf_modules=leaf_modules, root=where.root, dynamic=dynamic)
    memo: passes.Memo = {}  # shared, since most operations are in both graphs
    train = passes.explicit_writes(passes.annotate(traced.train, example.kwargs, training=True, memo=memo))
    returned = _returned_specs(train)
    key = find_primary(returned, output)
    auxiliary: tuple[Step, ...] = ()
    passes.crossings(train, output=output, whole=traced.capture.hosted)
    if traced.eval is traced.train:
        evaluation = train
    else:
        evaluation = passes.annotate(traced.eval, example.kwargs, training=False, memo=memo)
        evaluation = passes.explicit_writes(evaluation)
        eval_returned = _returned_specs(evaluation)
        eval_key = resolve_key(eval_returned, output)
        eval_key = eval_key if has_field(eval_returned, eval_key) else None
        passes.crossings(evaluation, output=eval_key, whole=traced.capture.hosted)
        auxiliary = _auxiliary_fields(returned, eval_returned, key)
    sizes_are_free = traced.capture.free_batch and not traced.capture.hosted
    loss_about = loss_node(train.graph, output, whole=traced.capture.hosted)
    passes.batch(train, evaluation, example if sizes_are_free else None, primary=loss_about)
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
    head_of = context_of(train, output, pick(returned, key))
    offered = mark_cuts(train, evaluation, where, named=named, fits=_fits(train, where, head_of))
    form = OutputFormat.of(traced.output, key, auxiliary)
    given = () if traced.capture.hosted else mark_given_fields(train, evaluation, form)
    return Analysed(
        train=train,
        eval=evaluation,
        mode_paths=traced.mode_paths,
        # From what the model itself returned, since dicts and lists in a graph are immutable classes of fx.
        output=replace(form, given=given),
        contexts={str(info(node).cut): head_of(node) for node in cut_points(train.graph)},
        example=example,
        few=traced.output,
        whole=repeated_to(traced.output, returned),
        offered=offered,
        named=named,
        capture=traced.capture,
        export=traced.export,
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


def _returned_specs(gm: fx.GraphModule) -> Any:
    """Return what a graph returns, with a :class:`~sedona_fx.ir.graph.TensorSpec` in place of every tensor."""
    (result,) = output_node(gm.graph).args
    return pytree.tree_map(lambda n: info(n).value if isinstance(n, fx.Node) else n, result)


def _auxiliary_fields(returned: Any, eval_returned: Any, key: Key) -> tuple[Step, ...]:
    """Return the fields in the shape of the primary output that are returned in train mode only (GoogLeNet has two)."""
    shape = pick(returned, key).shape
    first = key[0] if isinstance(key, tuple) else key
    in_eval = dict(fields(eval_returned))
    return tuple(
        name
        for name, value in fields(returned)
        if name != first and getattr(value, "shape", None) == shape and in_eval.get(name) is None
    )
