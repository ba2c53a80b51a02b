"""model -> TRACED: record what the model's forward does, once in train mode and once in eval mode.

Two front ends, one graph: symbolic tracing first, ``torch.export`` where it fails. A recording is trusted only after
checks: making it drew no random number and changed no state, and one forward in each mode gives exactly what the model
gives, buffers included (:mod:`sedona_fx.capture.proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.capture.exported import record_by_export
from sedona_fx.capture.host import graph_around, reads_of, watch_root
from sedona_fx.capture.proof import check_equal_forward
from sedona_fx.capture.sites import match_sites, name_sites, same_graphs
from sedona_fx.capture.state_watch import StateWatch, keep_parameters
from sedona_fx.capture.symbolic import find_leaves, record_symbolically
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors, without_objects
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes.retype import retype
from sedona_fx.plan import Capture, FrontEnd

WAYS_OUT = (
    "Ways out: name the module in leaf_modules=[...] to keep it whole (no cut inside it then; lines of the model's own "
    "forward go into a module of their own first); decouple only a part of the model with root='...' and let the rest "
    "run as it is; or move the decision out of forward (into __init__, or into torch.where)."
)
Recorder = Callable[[], tuple[fx.GraphModule, list[nn.Module]]]


@dataclass(frozen=True)
class Traced:
    """The train graph and the eval graph of a model; one object where the two do not differ.

    ``mode_paths`` maps the modules that look at their own ``training`` flag while the graph is made to what that flag
    was in train mode and in eval mode: a graph is chosen for the net at once, so they must keep these flags. It is
    empty where the modes do not differ. ``output`` is what the model returned in train mode for the first two examples.
    ``capture`` says how they were recorded: which front end, which sizes are free, whether the code around `root` runs
    as Python, and which fields of the output (``"past_key_values (DynamicCache)"``) a graph cannot give.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: Any
    capture: Capture


def trace(model: nn.Module, example: Args, *, leaf_modules: Collection[str] = (), root: str = "") -> Traced:
    """Trace a model in train and in eval mode and prove both graphs against it.

    Args:
        model: the copy that the net will own. Its parameters, buffers and modes are as before afterwards.
        example: one batch; a few of its examples are run through the model and through both graphs. Arguments that
            hold no tensor are part of the graph.
        leaf_modules: module paths that stay whole, which only symbolic tracing can do.
        root: module path of the part to be cut. If the code around it cannot be traced, it runs as it is
            (:mod:`sedona_fx.capture.host`).

    Returns:
        Graphs whose tensors *are* the model's, each node with its module path and a site name that is the same in
        both graphs.

    Raises:
        TraceError: the forward cannot be recorded, or the recording does not do what the model does; with the line.
    """
    leaves = find_leaves(model, [leaf_modules] if isinstance(leaf_modules, str) else leaf_modules)
    given = example.bind(model.forward)
    try:
        return _prove(model, example, lambda: record_symbolically(model, given, leaves), "symbolic", lambda: True)
    except TraceError as error:
        first = error
    if root:
        return _trace_root(model, example, leaf_modules, root)
    if leaves:
        raise TraceError(f"{first} {WAYS_OUT}") from first
    watch = _settle(model, example)
    free: list[bool] = []

    def record() -> tuple[fx.GraphModule, list[nn.Module]]:
        gm, reads, free_batch = record_by_export(model, given)
        free.append(free_batch)
        return gm, reads

    try:
        return _prove(model, example, record, "export", lambda: all(free))
    except TraceError as second:
        watch.restore()
        raise TraceError(f"{first} torch.export cannot record it either: {second} {WAYS_OUT}") from first


def _trace_root(model: nn.Module, example: Args, leaf_modules: Collection[str], root: str) -> Traced:
    """Trace a sub-module by what enters it, and put the untraced host around its graphs."""
    given = example.bind(model.forward)
    seen = {training: watch_root(model, example, root, training=training) for training in (True, False)}
    inner = [path.removeprefix(f"{root}.") for path in leaf_modules if path.startswith(f"{root}.")]
    entering = Args(**map_tensors(lambda t: t.detach(), seen[True].given))
    traced = trace(model.get_submodule(root), entering, leaf_modules=inner)
    reads = reads_of(model, root, seen[True])
    train, evaluation = (
        graph_around(model, root, gm, given, seen[training], reads, training=training)
        for training, gm in ((True, traced.train), (False, traced.eval))
    )
    name_sites(train.graph)
    match_sites(train.graph, evaluation.graph)
    few = example.first(2) if traced.capture.free_batch else example
    output = check_equal_forward(model, verify(train, Phase.TRACED), few, training=True)
    check_equal_forward(model, verify(evaluation, Phase.TRACED), few, training=False)
    mode_paths = {f"{root}.{path}" if path else root: flags for path, flags in traced.mode_paths.items()}
    return Traced(train, evaluation, mode_paths, output, replace(traced.capture, hosted=True))


def _settle(model: nn.Module, example: Args) -> StateWatch:
    """Run the model once in eval mode, so that what it notes at its first call is noted before it is recorded.

    Returns:
        What it takes to put back the notes, too.
    """
    watch = StateWatch(model)
    with keep_parameters(model):
        with keep_modes(model), torch.no_grad(), suppress(Exception):
            model.eval()(**map_tensors(torch.clone, example.first(2).bind(model.forward)))
        watch.settle()
    return watch


def _prove(
    model: nn.Module, example: Args, record: Recorder, front_end: FrontEnd, free_batch: Callable[[], bool]
) -> Traced:
    """Record both modes, name the nodes of both graphs alike, and hold the graphs against the model."""
    with keep_modes(model):
        model.train()
        train, reads = record()
        flags = {module: module.training for module in reads}
        model.eval()
        evaluation, reads = record()
        name_sites(train.graph)
        match_sites(train.graph, evaluation.graph)
        same = same_graphs(train, evaluation)
        evaluation = train if same else evaluation
        paths = {} if same else {m: path for path, m in model.named_modules() if m in flags or m in reads}
        mode_paths = {path: (flags.get(m, True), m.training) for m, path in paths.items()}
    few = example.first(2) if free_batch() else example
    output, left_out = without_objects(check_equal_forward(model, verify(train, Phase.TRACED), few, training=True))
    eval_output, _ = without_objects(check_equal_forward(model, verify(evaluation, Phase.TRACED), few, training=False))
    retype(train, output)
    if not same:
        retype(evaluation, eval_output)
    capture = Capture(front_end=front_end, free_batch=free_batch(), left_out=left_out)
    return Traced(train, evaluation, mode_paths, output, capture)
