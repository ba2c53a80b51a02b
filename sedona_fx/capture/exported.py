"""The second front end: ``torch.export``, for models that symbolic tracing cannot record.

It runs the forward on fake tensors, so Python code that depends on shapes, types and settings is no obstacle. Its
result is a flat program of ATen operators for one mode; :mod:`sedona_fx.capture.convert` rewrites that as a graph like
those of the first front end.
"""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.blame import user_line
from sedona_fx.capture.checkpoints import plain_checkpoints
from sedona_fx.capture.convert import Converter
from sedona_fx.capture.graph_module import build_graph_module
from sedona_fx.capture.hooks import Registrations, hooked_modules, refusal, watch_hooks
from sedona_fx.capture.inline_regions import inline_regions, mark_regions
from sedona_fx.capture.regions import watch_regions
from sedona_fx.capture.state_watch import StateWatch, keep_parameters, keep_state
from sedona_fx.capture.tracer import watch_training_flags
from sedona_fx.capture.whole.derivatives import DerivativeWatch
from sedona_fx.capture.whole.kinds import whole_in_export
from sedona_fx.capture.whole.operators import whole_calls
from sedona_fx.capture.whole.reasons import NeedsTensors, is_opaque, module_of, reason_of
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.outputs import leaves, map_tensors, without_objects
from sedona_fx.ir.same_numbers import same_bits
from sedona_fx.rng import seed_all

_OTHER_BATCH_SIZES = (2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 128, 1000, 1024)
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41)


def record_by_export(
    model: nn.Module, arguments: Mapping[str, Any], leaves: Collection[nn.Module] = ()
) -> tuple[fx.GraphModule, list[nn.Module], bool]:
    """Record the model's forward in its present mode by ``torch.export``.

    Args:
        model: its state is the same afterwards.
        arguments: name -> value. All sizes are fixed to those of the values, except the batch where possible.
        leaves: modules that become one node each, besides those that cannot be looked into.

    Returns:
        The graph, the modules that read their own ``training`` flag, and whether the graph serves every batch size.

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
    with whole_calls(model, whole) as calls:
        capture = _capture(model, arguments, free_batch=free_batch)
        if free_batch and not _serves_every_batch(capture, arguments):
            free_batch = False
            capture = _capture(model, arguments, free_batch=False)
    graph, attributes = Converter(
        model=model,
        source=capture.source,
        program=capture.program,
        arguments=arguments,
        model_output=capture.model_output,
        calls=calls,
    ).convert()
    return build_graph_module(model, graph, attributes), capture.mode_reads, free_batch


@dataclass(frozen=True)
class _Capture:
    """One run of torch.export: its program, the program's graph, and what was observed of the model meanwhile."""

    program: torch.export.ExportedProgram
    source: fx.GraphModule
    model_output: Any
    mode_reads: list[nn.Module]


def _capture(model: nn.Module, arguments: Mapping[str, Any], *, free_batch: bool) -> _Capture:
    """Export the model, with a symbolic batch size if `free_batch`, else with the example's.

    The program returns the flat list of the tensors in the model's output, so torch.export need not know the types
    around them.
    """
    example = _repeat_to_unusual_batch(arguments) if free_batch else dict(arguments)
    watch, registrations = StateWatch(model), Registrations()
    mode_reads: dict[nn.Module, None] = {}
    changes: list[str] = []
    replaced: list[tuple[Any, str]] | None = []
    model_output: Any = None

    # torch.export undoes what a forward does to attributes that there were. This hook looks at them before that.
    def observe(_module: nn.Module, _inputs: Any, output: Any) -> list[Any]:
        nonlocal replaced, model_output
        if change := watch.changed(tensors=False):
            changes.append(change)
            replaced = watch.replaced_attributes()
            watch.remove_added()
        model_output, _ = without_objects(output)
        return list(leaves(model_output))

    handle = model.register_forward_hook(observe)
    try:
        with _quietly(), torch.enable_grad(), watch_training_flags(mode_reads), watch_regions(strict=False) as regions:
            shapes = _dynamic_shapes(example) if free_batch else None
            with watch_hooks(registrations), plain_checkpoints(), mark_regions(regions), DerivativeWatch(refuse=True):
                program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
            hook = registrations.first()
            source = program.module()
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}{user_line(error)}."
        if is_opaque(error):
            raise NeedsTensors(
                f"{module_of(error, model) or type(model).__name__}: {reason}", module_of(error, model)
            ) from error
        raise TraceError(reason) from error
    finally:
        handle.remove()
        registrations.remove()
        change_after = watch.restore()
    if hook:
        raise TraceError(refusal(hook))
    if not change_after and changes and replaced and _are_scratch(model, arguments, replaced):
        changes = []  # every forward writes these attributes before it reads them: earlier values have no effect
    if change := next(filter(None, [*changes, change_after]), ""):
        raise TraceError(f"its forward {change}, which would happen once, now, and never again in training.")
    assert isinstance(source, fx.GraphModule)
    inline_regions(source)
    return _Capture(program, source, model_output, list(mode_reads))


def _serves_every_batch(capture: _Capture, arguments: Mapping[str, Any]) -> bool:
    """Whether a program is right for other batch sizes too.

    The program of a forward that branches on the batch size is right for some sizes only. The program's own guards
    tell for which; they are run on meta tensors of several sizes.
    """
    inputs = [node.meta.get("val") for node in capture.source.graph.nodes if node.op == "placeholder"]
    if any(isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], int) for value in inputs):
        return False
    guards = getattr(capture.source, "_guards_fn", None)
    if guards is None:  # older versions of PyTorch keep them elsewhere
        return True
    # The guards take the inputs in the order of the forward's signature, which may differ from that of `arguments`.
    spec = capture.program.call_spec.in_spec
    ordered_names = pytree.tree_unflatten(list(range(len(inputs))), spec)[1]
    values = pytree.tree_leaves({name: arguments[name] for name in ordered_names})

    def resized(value: Any, size: int) -> Any:
        has_batch = isinstance(value, Tensor) and value.dim()
        return value[:1].expand(size, *value.shape[1:]).to("meta") if has_batch else value

    for size in _OTHER_BATCH_SIZES:
        try:
            guards(*(resized(value, size) for value in values))
        except AssertionError:
            return False
    return True


def _are_scratch(model: nn.Module, arguments: Mapping[str, Any], replaced: list[tuple[Any, str]]) -> bool:
    """Whether the forward never reads what stood in these attributes before it.

    This is tested: with a value in each that no code can use, the model must return the same bits.

    Args:
        model: its state is the same afterwards.
        arguments: name -> value.
        replaced: the attributes, as (``vars(module)``, name).
    """

    def run(poisoned: bool) -> Any:
        with keep_state(model), torch.no_grad():
            for attributes, name in replaced if poisoned else ():
                attributes[name] = object()
            seed_all(0)
            return model(**map_tensors(torch.clone, Args(**arguments).first(2).kwargs))

    with keep_parameters(model) as overwritten:
        try:
            return same_bits(run(poisoned=False), run(poisoned=True)) and not overwritten()
        except Exception:
            return False


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


def _dynamic_shapes(example: Mapping[str, Any]) -> dict[str, Any]:
    """Tell torch.export that the first dimension of every input tensor is the batch, of any size."""

    def batch_first(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    return {name: pytree.tree_map(batch_first, value) for name, value in example.items()}
