"""The second front end: ``torch.export``, for models that symbolic tracing cannot record.

It runs the forward on fake tensors, so Python code that depends on shapes, types and settings is no obstacle. Its
result is a flat program of ATen operators for one mode; :mod:`sedona_fx.capture.exporting.convert` rewrites that as a
graph like those of the first front end.
"""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from sedona_fx.capture.attributes import UNWRITTEN, scratch_attributes
from sedona_fx.capture.blame import StreamWatch, current_line, locate_side_effect, user_line
from sedona_fx.capture.checkpoints import plain_checkpoints
from sedona_fx.capture.exporting.convert import Converter
from sedona_fx.capture.exporting.free_sizes import GuardedProgram
from sedona_fx.capture.exporting.inline_regions import inline_regions, mark_regions
from sedona_fx.capture.graph_module import build_graph_module
from sedona_fx.capture.hooks import Registrations, hooked_modules, refusal, watch_hooks
from sedona_fx.capture.keep import keep_parameters, keep_state
from sedona_fx.capture.layer_stacks import unknown_masks
from sedona_fx.capture.names import INSIDE, Inside, has_own_names
from sedona_fx.capture.regions import watch_regions
from sedona_fx.capture.state_watch import DRAWS, StateWatch
from sedona_fx.capture.tracer import watch_training_flags
from sedona_fx.capture.whole.derivatives import DerivativeWatch
from sedona_fx.capture.whole.kinds import whole_in_export
from sedona_fx.capture.whole.operators import whole_calls
from sedona_fx.capture.whole.reasons import NeedsTensors, Undecided, asks_for_numbers, is_opaque, module_of, reason_of
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.outputs import leaves, map_tensors, without_objects
from sedona_fx.plan_values import FreeSize

_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41)


@dataclass(frozen=True)
class Exported:
    """A recording.

    Attributes:
        graph: the graph, in the graph dialect.
        mode_readers: the modules that read their own ``training`` flag.
        free_batch: whether the graph serves every batch size.
        free_sizes: the other sizes of inputs that are free.
    """

    graph: fx.GraphModule
    mode_readers: list[nn.Module]
    free_batch: bool
    free_sizes: tuple[FreeSize, ...] = ()


def record_by_export(
    model: nn.Module,
    arguments: Mapping[str, Any],
    leaves: Collection[nn.Module] = (),
    *,
    free_sizes: bool = True,
    told: list[str] | None = None,
) -> Exported:
    """Record the model's forward in its present mode by ``torch.export``.

    Args:
        model: its state is the same afterwards.
        arguments: name -> value. The batch is left free where possible.
        leaves: modules that become one node each, besides those that cannot be looked into.
        free_sizes: whether to leave the other sizes of inputs free, too, where possible.
        told: as for :func:`~sedona_fx.capture.regions.watch_regions`.

    Raises:
        TraceError: the program cannot be captured, or the forward changed state, drew numbers outside of the graph or
            registered hooks, or modules have backward hooks.
    """
    whole = whole_in_export(model, leaves)
    if hooked := hooked_modules(model, "backward", whole):
        raise TraceError(
            f"backward hooks hang on {', '.join(hooked)}, and an exported program has no modules for them to hang on. "
            "Remove them before the model is decoupled."
        )
    free_batch = Args(**arguments).batch_size() is not None
    capture: _Capture | None = None
    sizes: tuple[FreeSize, ...] = ()
    with whole_calls(model, whole) as calls:
        if free_batch and free_sizes:
            with suppress(TraceError):  # with fewer sizes free it may go
                capture = _capture(model, arguments, free=_all_sizes, told=told)
                sizes = GuardedProgram(capture.program, capture.source, arguments).free_sizes()
        if capture is None:
            capture = _capture(model, arguments, free=_batch_size if free_batch else None, told=told)
        if free_batch and not GuardedProgram(capture.program, capture.source, arguments).serves_every_batch():
            free_batch, sizes = False, ()
            capture = _capture(model, arguments, free=None, told=told)
    graph, attributes = Converter(
        model=model,
        source=capture.source,
        program=capture.program,
        arguments=arguments,
        model_output=capture.model_output,
        inside=capture.inside,
        calls=calls,
    ).convert()
    gm = build_graph_module(model, graph, attributes)
    gm.meta[UNWRITTEN] = capture.unwritten
    return Exported(gm, capture.mode_reads, free_batch=free_batch, free_sizes=sizes)


def why_fixed(model: nn.Module, arguments: Mapping[str, Any], name: str, dim: int) -> str:
    """Return what fixes a size of an input in an exported program, with the line of the user's code; ``""`` if nothing.

    PyTorch notes each condition on a symbol when the forward comes upon it; the line is the one that runs then.
    """
    lines: dict[str, str] = {}
    note = getattr(ShapeEnv, "_log_guard", None)  # not public: without it there is no line

    def noting(self: ShapeEnv, prefix: str, guard: Any, *rest: Any, **options: Any) -> Any:
        lines.setdefault(str(guard), current_line())
        return note(self, prefix, guard, *rest, **options) if note is not None else None

    try:
        noted = mock.patch.object(ShapeEnv, "_log_guard", noting) if note is not None else nullcontext()
        with noted, whole_calls(model, whole_in_export(model, ())):
            source = _capture(model, arguments, free=_all_sizes).source
    except TraceError as error:
        return str(error)
    values = [node.meta.get("val") for node in source.graph.nodes if node.op == "placeholder"]
    env = next((value.fake_mode.shape_env for value in values if hasattr(value, "fake_mode")), None)
    symbol = env.source_to_var.get(f"L['{name}'].size()[{dim}]") if env is not None else None
    if env is None or symbol is None:
        return ""
    conditions = [guard.expr for guard in env.guards]
    equal = {symbol}
    for condition in conditions:  # ids.shape[1] == mask.shape[1], say
        if condition.is_Equality and condition.free_symbols & equal and all(side.is_Symbol for side in condition.args):
            equal |= condition.free_symbols
    for condition in conditions:
        if condition.free_symbols and condition.free_symbols <= equal and len(condition.free_symbols) == 1:
            text = str(condition.subs(dict.fromkeys(equal, type(symbol)("size"))))
            return f"{text} has to hold{lines.get(str(condition), '')}"
    return ""


@dataclass(frozen=True)
class _Capture:
    """One run of torch.export: its program, the program's graph, and what was observed of the model meanwhile.

    Attributes:
        inside: what the paths of the program begin with.
        unwritten: attributes that the forward writes, and the program does not.
    """

    program: torch.export.ExportedProgram
    source: fx.GraphModule
    model_output: Any
    mode_reads: list[nn.Module]
    inside: str
    unwritten: tuple[str, ...]


def _capture(
    model: nn.Module,
    arguments: Mapping[str, Any],
    *,
    free: Callable[[Tensor], dict[int, Any]] | None,
    told: list[str] | None = None,
) -> _Capture:
    """Export the model, with symbols for the sizes that `free` gives of a tensor, else with the example's sizes.

    The program returns the flat list of the tensors in the model's output, so torch.export need not know the types
    around them.
    """
    example = _repeat_to_unusual_batch(arguments) if free is not None else dict(arguments)
    watch, registrations = StateWatch(model), Registrations()
    mode_reads: dict[nn.Module, None] = {}
    changes: list[str] = []
    attributes_alone = True
    model_output: Any = None

    # torch.export undoes what a forward does to attributes that there were. This hook looks at them before that.
    def observe(_module: nn.Module, _inputs: Any, output: Any) -> list[Any]:
        nonlocal attributes_alone, model_output
        if change := watch.changed(tensors=False):
            changes.append(change)
            attributes_alone = watch.only_attributes(tensors=False)
            watch.remove_added()
        model_output, _ = without_objects(output)
        return list(leaves(model_output))

    # The program is a graph module, at whose top no tensor may have a name that fx has there.
    inside = INSIDE if has_own_names(model) else ""
    outermost = Inside(model) if inside else model
    handle = model.register_forward_hook(observe)
    try:
        watched = watch_regions(strict=False, told=told)
        with _quietly(), torch.enable_grad(), watch_training_flags(mode_reads), watched as regions:
            shapes = _dynamic_shapes(example, free) if free is not None else None
            hooks, derivatives = watch_hooks(registrations), DerivativeWatch(refuse=True)
            with hooks, plain_checkpoints(), mark_regions(regions), unknown_masks(), derivatives:
                program = torch.export.export(outermost, (), example, dynamic_shapes=shapes, strict=False)
            hook = registrations.first()
            source = program.module()
    except Exception as error:
        path = module_of(error, model)
        reason, line = f"{type(error).__name__}: {reason_of(error)}", user_line(error)
        if is_opaque(error):
            raise NeedsTensors(f"{path or type(model).__name__}: {reason}{line}.", path) from error
        if asks_for_numbers(error):
            raise Undecided(f"{reason}{f', in {path}' if path and line else ''}{line}.", path) from error
        raise TraceError(f"{reason}{f', in {path}' if path and line else ''}{line}.") from error
    finally:
        handle.remove()
        registrations.remove()
        change_after = watch.restore()
    if hook:
        raise TraceError(refusal(hook))
    unwritten = None
    if changes and attributes_alone:
        unwritten = scratch_attributes(model, arguments)
    if (change := next(filter(None, [*changes, change_after]), "")) and unwritten is None:
        line, path = _drawing(model, arguments) if change == DRAWS else ("", "")
        text = f"its forward {change}, which would happen once, now, and never again in training{line}."
        raise Undecided(text, path) if change == DRAWS else TraceError(text)
    assert isinstance(source, fx.GraphModule)
    inline_regions(source)
    return _Capture(program, source, model_output, list(mode_reads), inside=inside, unwritten=unwritten or ())


def _drawing(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Return the line that draws from Python's or NumPy's generators, and the path of the module whose code it is.

    The model itself is run: as it is, nothing else looks at these generators meanwhile.
    """

    def run() -> None:
        model(**map_tensors(torch.clone, Args(**arguments).first(2).kwargs))

    with keep_state(model), keep_parameters(model), torch.no_grad():
        return locate_side_effect(model, run, StreamWatch(model))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch.export from printing the whole program and its warnings: the error says what went wrong."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _repeat_to_unusual_batch(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat examples until the batch size differs from every other size, which torch.export might take for it."""
    args = Args(**arguments)
    size = args.batch_size() or 1
    other_sizes = {extent for tensor in args.tensors() for extent in tensor.shape}
    unusual = next(n for n in itertools.chain(_PRIMES, itertools.count(43, 2)) if n not in other_sizes)
    return args.map(lambda t: t[torch.arange(unusual, device=t.device) % size] if t.dim() else t).kwargs


def _dynamic_shapes(example: Mapping[str, Any], free: Callable[[Tensor], dict[int, Any]]) -> dict[str, Any]:
    """Tell torch.export which dimensions of the input tensors may have any size."""

    def of(value: Any) -> Any:
        return free(value) if isinstance(value, Tensor) and value.dim() else None

    return {name: pytree.tree_map(of, value) for name, value in example.items()}


def _batch_size(tensor: Tensor) -> dict[int, Any]:
    return {0: torch.export.Dim.AUTO}


def _all_sizes(tensor: Tensor) -> dict[int, Any]:
    return dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO)
