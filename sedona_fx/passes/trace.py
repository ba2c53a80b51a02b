"""model -> TRACED: record what the model's forward does, once in train mode and once in eval mode.

There are two front ends, which make the same kind of graph: symbolic tracing is tried first, ``torch.export`` if it
fails. A recording is trusted only after checks, since either can be silently wrong: making it drew no random number and
changed no state (:mod:`sedona_fx.capture.state_watch`) but attributes that carry nothing from call to call
(:mod:`sedona_fx.capture.attributes`), and one forward pass in each mode gives exactly what the model
gives, buffers included (:mod:`sedona_fx.capture.proof`). Gradients are compared as well where a recording may have lost
what changes them: in all exported programs, and wherever the model has hooks (:mod:`sedona_fx.capture.hooks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx, nn

from sedona_fx.capture.attributes import UNWRITTEN, check_computed, settle
from sedona_fx.capture.exporting.exported import Exported, record_by_export, why_fixed
from sedona_fx.capture.exporting.free_sizes import in_both
from sedona_fx.capture.hooks import Registrations, hooks_of, refusal, tell_of_silent_hooks, watch_hooks
from sedona_fx.capture.host import graph_around, reads_of, watch_root
from sedona_fx.capture.names import allow_names
from sedona_fx.capture.proof import check_equal_forward
from sedona_fx.capture.regions import keep_process_state
from sedona_fx.capture.sites import match_sites, name_sites, same_graphs
from sedona_fx.capture.symbolic import find_leaves, record_symbolically
from sedona_fx.capture.whole.chosen import CHOSEN, ChosenWhole
from sedona_fx.data.args import Args
from sedona_fx.data.sizes import resized
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors, without_objects
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes.retype import retype
from sedona_fx.plan_values import Capture, ExportOptions, FreeSize, FrontEnd

log = logging.getLogger(__name__)

Recorder = Callable[[], tuple[fx.GraphModule, list[nn.Module]]]
"""Records the model in its present mode; returns the graph and the modules that read their ``training`` flag."""


@dataclass(frozen=True)
class Traced:
    """The graphs of a model in both modes. Made by :func:`trace`.

    Attributes:
        train: the train graph.
        eval: the eval graph; the same object as `train` if the two do not differ.
        mode_paths: path of each module that read its own ``training`` flag while the graphs were recorded -> that flag
            in train mode and in eval mode. It must keep these flags, since a graph is chosen for the net at once. Empty
            if the modes do not differ.
        output: what the model returned in train mode for the first two examples.
        capture: how the graphs were recorded: which front end, which sizes are free, whether the code around `root`
            runs as Python, and which fields of the output (``"past_key_values (DynamicCache)"``) a graph cannot give.
        export: with which options, where ``torch.export`` recorded them.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: Any
    capture: Capture
    export: ExportOptions = field(default_factory=ExportOptions)


Dynamic = Mapping[str, Collection[int]] | Literal[False] | None
"""Argument -> dimensions of any size, besides the batch; False: none; None: what an exported program leaves free."""


def trace(
    model: nn.Module,
    example: Args,
    *,
    leaf_modules: Collection[str] = (),
    root: str = "",
    dynamic: Dynamic = None,
) -> Traced:
    """Trace a model in train and in eval mode, and prove that both graphs compute what it computes.

    Before: an ``nn.Module``. After: TRACED graphs whose tensors *are* the model's, each node with its module path and
    with a site name that is the same in both graphs.

    Args:
        model: the copy that the net will own. Its parameters, buffers and modes are as before afterwards.
        example: one batch. A few of its examples are run through the model and through both graphs. Arguments without
            tensors become part of the graphs.
        leaf_modules: module paths that are kept whole.
        root: module path of the part to be cut. If the code around it cannot be traced, it runs as Python
            (:mod:`sedona_fx.capture.host`).
        dynamic: sizes of inputs that have to be free.

    Raises:
        TraceError: a size cannot be free; or the forward cannot be recorded, or the recording does not compute what the
            model computes; with the line of the user's code or the first module that differs.
        DataError: the model itself cannot run the example.
    """
    if "backward" in hooks_of(model):
        raise TraceError(
            f"a backward hook hangs on {type(model).__name__} itself, and no block runs the whole of it. Register it "
            "on the layers that it is about."
        )
    leaf_modules = [leaf_modules] if isinstance(leaf_modules, str) else leaf_modules
    allow_names(model)
    check_computed(model, example)
    with keep_process_state():
        traced = _trace(model, example, leaf_modules=leaf_modules, root=root, free_sizes=dynamic is not False)
    if dynamic and traced.capture.fixed_sizes:
        _check_free(model, example, dynamic, traced.capture)
    both = (traced.train, traced.eval)
    if unwritten := list(dict.fromkeys(path for gm in both for path in gm.meta.get(UNWRITTEN, ()))):
        log.warning(
            "the forward of %s writes the attributes %s, which the net computes but does not write: read what you need "
            "of them from the output.",
            type(model).__name__,
            ", ".join(map(repr, unwritten[:5])) + (f" and {more} more" if (more := len(unwritten) - 5) > 0 else ""),
        )
    if not traced.capture.hosted:
        calls = {str(node.target) for node in traced.train.graph.nodes if node.op == "call_module"}
        tell_of_silent_hooks(model, [model.get_submodule(path) for path in calls], traced.capture.front_end)
    return traced


def _trace(
    model: nn.Module, example: Args, *, leaf_modules: Collection[str], root: str, free_sizes: bool = True
) -> Traced:
    """:func:`trace`, without a look at hooks that hang on the model itself.

    Code that neither front end can record, but that runs in a module which is kept whole, makes its module whole.
    """
    chosen = ChosenWhole(model, find_leaves(model, leaf_modules))
    while True:
        exported: TraceError | None = None
        try:
            traced = _trace_symbolically(model, example, chosen.leaves)
            break
        except TraceError as error:
            symbolic = error
        if root:
            return _trace_root(model, example, leaf_modules, root)
        if chosen.tries_export or not chosen.can_go_on(symbolic):
            try:
                traced = _trace_by_export(model, example, chosen.leaves, free_sizes)
                break
            except TraceError as error:
                exported = error
        chosen.add(symbolic, exported)
    chosen.tell()
    traced.train.meta[CHOSEN] = dict(chosen.reasons)
    return traced


def _trace_symbolically(model: nn.Module, example: Args, leaves: frozenset[nn.Module]) -> Traced:
    inputs = example.bind(model.forward)
    return _record_both(model, example, lambda: record_symbolically(model, inputs, leaves), "symbolic", lambda: True)


def _trace_by_export(model: nn.Module, example: Args, leaves: frozenset[nn.Module], free_sizes: bool) -> Traced:
    """Trace by the second front end; if it cannot, the state of the model is as before."""
    watch, registrations, notes = settle(model, example)
    try:
        return _export_both(model, example, leaves, free_sizes)
    except TraceError:
        registrations.remove()
        watch.restore()
        if not notes:
            raise
    # A note may say that something is there which is not: a tensor beside it, made at the first call as well.
    return _export_both(model, example, leaves, free_sizes)


def _with_free_sizes(
    model: nn.Module, inputs: Mapping[str, Any], traced: Traced, sizes: tuple[FreeSize, ...]
) -> Traced:
    """Return the recordings with the sizes that they leave free, if at other sizes they compute what the model does."""
    other = resized(Args(**inputs).first(2).kwargs, sizes) if sizes and traced.capture.free_batch else None
    if other is None:
        return traced
    try:
        for gm, training in ((traced.train, True), (traced.eval, False)):
            check_equal_forward(model, gm, Args(**other), training=training)
    except (TraceError, DataError) as error:
        log.info("sizes of inputs stay fixed: %s", error)
        return traced
    return replace(traced, capture=replace(traced.capture, free_sizes=sizes))


def _check_free(model: nn.Module, example: Args, dynamic: Mapping[str, Collection[int]], capture: Capture) -> None:
    """Raise TraceError unless the sizes that the user wants free are; says which is not, and what fixes it."""
    free = {(size.name, size.dim) for size in capture.free_sizes}
    free |= {(name, 0) for name in dynamic if capture.free_batch}
    for name, dim in ((name, dim) for name, dims in dynamic.items() for dim in dims):
        if (name, dim) not in free:
            with keep_modes(model):
                reasons = (why_fixed(model.train(mode), example.kwargs, name, dim) for mode in (True, False))
                reason = next(filter(None, reasons), "the program is not right at every size")
            raise TraceError(
                f"dimension {dim} of the input {name!r} cannot be free in {type(model).__name__}: {reason}. Compute "
                "what depends on the size from x.shape in forward, without int(...) and without branches on it; or "
                "leave it out of dynamic=, then it is fixed to that of the first batch."
            )


def _export_both(model: nn.Module, example: Args, leaves: frozenset[nn.Module], free_sizes: bool) -> Traced:
    """Record both modes by ``torch.export``.

    Code that asks whether autocast is on is told so at first: if it only opens a region then, the graphs have that
    region, and are right with and without autocast. Otherwise the proof fails, and the code is told the truth.
    """

    inputs = example.bind(model.forward)

    def attempt(told: list[str] | None) -> Traced:
        made: list[Exported] = []

        def record() -> tuple[fx.GraphModule, list[nn.Module]]:
            made.append(record_by_export(model, inputs, leaves, free_sizes=free_sizes, told=told))
            return made[-1].graph, made[-1].mode_readers

        traced = _record_both(model, example, record, "export", lambda: all(one.free_batch for one in made))
        traced = _with_free_sizes(model, inputs, traced, in_both(*(one.free_sizes for one in made)))
        return replace(traced, export=ExportOptions(free_sizes=free_sizes, tell_autocast=told is not None))

    told: list[str] = []
    try:
        return attempt(told)
    except TraceError:
        if not told:
            raise
    return attempt(None)


def _trace_root(model: nn.Module, example: Args, leaf_modules: Collection[str], root: str) -> Traced:
    """Trace a sub-module with what enters it, and put the untraced code around it into the graphs as two calls."""
    inputs = example.bind(model.forward)
    registrations = Registrations()
    with watch_hooks(registrations):
        seen = {training: watch_root(model, example, root, training=training) for training in (True, False)}
    hook = registrations.first()
    registrations.remove()
    if hook:
        raise TraceError(f"cannot run the code around {root!r} twice a step: {refusal(hook)}")
    inner_leaves = [path.removeprefix(f"{root}.") for path in leaf_modules if path.startswith(f"{root}.")]
    entering = Args(**map_tensors(lambda t: t.detach(), seen[True].given))
    traced = _trace(model.get_submodule(root), entering, leaf_modules=inner_leaves, root="")
    host_reads = reads_of(model, root, seen[True])
    train, evaluation = (
        graph_around(model, root, gm, arguments=inputs, seen=seen[training], reads=host_reads, training=training)
        for training, gm in ((True, traced.train), (False, traced.eval))
    )
    name_sites(train.graph)
    match_sites(train.graph, evaluation.graph)
    few = example.first(2) if traced.capture.free_batch else example
    output = check_equal_forward(model, verify(train, Phase.TRACED), few, training=True)
    check_equal_forward(model, verify(evaluation, Phase.TRACED), few, training=False)
    mode_paths = {f"{root}.{path}" if path else root: flags for path, flags in traced.mode_paths.items()}
    return Traced(
        train=train,
        eval=evaluation,
        mode_paths=mode_paths,
        output=output,
        capture=replace(traced.capture, hosted=True),
    )


def _record_both(
    model: nn.Module, example: Args, record: Recorder, front_end: FrontEnd, free_batch: Callable[[], bool]
) -> Traced:
    """Record both modes, give the nodes of both graphs the same site names, and compare the graphs with the model.

    Args:
        model: as for :func:`trace`.
        example: as for :func:`trace`.
        record: the front end.
        front_end: its name.
        free_batch: whether the graphs take batches of any size; called when they have been recorded.
    """
    with keep_modes(model):
        model.train()
        train, mode_readers = record()
        train_flags = {module: module.training for module in mode_readers}
        model.eval()
        evaluation, mode_readers = record()
        name_sites(train.graph)
        match_sites(train.graph, evaluation.graph)
        same = same_graphs(train, evaluation)
        evaluation = train if same else evaluation
        readers = {m: path for path, m in model.named_modules() if m in train_flags or m in mode_readers}
        # For a module that read its flag in eval mode only, the flag in train mode is the one that train() sets.
        mode_paths = {} if same else {path: (train_flags.get(m, True), m.training) for m, path in readers.items()}
    few = example.first(2) if free_batch() else example
    output, eval_output = (
        check_equal_forward(model, verify(gm, Phase.TRACED), few, training=training, gradients=front_end == "export")
        for gm, training in ((train, True), (evaluation, False))
    )
    output, left_out = without_objects(output)
    eval_output, _ = without_objects(eval_output)
    retype(train, output)
    if not same:
        retype(evaluation, eval_output)
    capture = Capture(front_end=front_end, free_batch=free_batch(), left_out=left_out)
    return Traced(train=train, eval=evaluation, mode_paths=mode_paths, output=output, capture=capture)
