"""The second front end: ``torch.export``, for models that symbolic tracing cannot record.

It runs the forward on fake tensors, so Python code on shapes, types and settings is no obstacle. What it gives is one
flat program of ATen operators with the mode baked in; here it becomes a graph as the first front end makes them: one
placeholder an argument, the model's own output type, the user's tensors under the user's names, every node with its
module path, every parameter read where it is used.
"""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.blame import user_line
from sedona_fx.capture.convert import Converter
from sedona_fx.capture.proof import same_bits
from sedona_fx.capture.state_watch import StateWatch, keep_parameters, keep_state
from sedona_fx.capture.symbolic import is_impure
from sedona_fx.capture.tracer import watch_training_flags
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.outputs import leaves, map_tensors, without_objects
from sedona_fx.rng import seed_all

_BATCHES = (2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 128, 1000, 1024)
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41)


def record_by_export(model: nn.Module, given: Mapping[str, Any]) -> tuple[fx.GraphModule, list[nn.Module], bool]:
    """Return the graph of the model in its present mode, the modules that looked at their mode, and if the batch is
    free.

    Raises:
        TraceError: the program cannot be captured, or the forward changed state or drew numbers outside of the graph.
    """
    size = Args(**given).batch_size()
    program, source, returned, reads = _capture(model, given, free=size is not None)
    if size is not None and not _serves_every_batch(source, program, given):
        program, source, returned, reads = _capture(model, given, free=False)
        size = None
    graph, attributes = Converter(model, source, program, given, returned).convert()
    graph.eliminate_dead_code(is_impure)
    gm = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    return gm, reads, size is not None


def _capture(
    model: nn.Module, given: Mapping[str, Any], *, free: bool
) -> tuple[torch.export.ExportedProgram, fx.GraphModule, Any, list[nn.Module]]:
    """Return the program, its graph, what the model returned, and the modules that looked at their mode.

    The program gives the tensors in what the model returned, one behind the other: so torch.export need not know the
    types around them. With `free` its batch is free, else the example's.
    """
    example = _unusual_batch(given) if free else dict(given)
    watch = StateWatch(model)
    reads: dict[nn.Module, None] = {}
    changes: list[str] = []
    # torch.export takes back what a forward does to attributes: look before it does.
    notes: list[tuple[Any, str]] | None = []
    returned: Any = None

    def look(_module: nn.Module, _inputs: Any, output: Any) -> list[Any]:
        nonlocal notes, returned
        if change := watch.changed(tensors=False):
            changes.append(change)
            notes = watch.replaced_attributes()
        returned, _ = without_objects(output)
        return list(leaves(returned))

    handle = model.register_forward_hook(look)
    try:
        with _quietly(), torch.enable_grad(), watch_training_flags(reads):
            shapes = _free_batch(example) if free else None
            program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
            source = program.module()
    except Exception as error:
        raise TraceError(_reason(error)) from error
    finally:
        handle.remove()
        after = watch.restore()
    if not after and changes and notes and _are_scratch(model, given, notes):
        changes = []  # written before they are read in every forward: nobody sees what an earlier one left there
    if changed := next(filter(None, [*changes, after]), ""):
        raise TraceError(f"its forward {changed}, which would happen once, now, and never again in training.")
    assert isinstance(source, fx.GraphModule)
    return program, source, returned, list(reads)


def _serves_every_batch(
    source: fx.GraphModule, program: torch.export.ExportedProgram, given: Mapping[str, Any]
) -> bool:
    """Whether a program is right for other batches: a forward that branches on their number gives one for some of them.

    The program says itself for which sizes it was made (its guards); they are asked, on tensors without numbers.
    """
    inputs = [node.meta.get("val") for node in source.graph.nodes if node.op == "placeholder"]
    if any(isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], int) for value in inputs):
        return False
    guards = getattr(source, "_guards_fn", None)
    if guards is None:  # older versions of PyTorch keep them elsewhere
        return True
    # As export orders them: by the signature, not as they were given.
    order = pytree.tree_unflatten(list(range(len(inputs))), program.call_spec.in_spec)[1]
    values = pytree.tree_leaves({name: given[name] for name in order})

    def resized(value: Any, count: int) -> Any:
        sized = isinstance(value, Tensor) and value.dim()
        return value[:1].expand(count, *value.shape[1:]).to("meta") if sized else value

    for count in _BATCHES:
        try:
            guards(*(resized(value, count) for value in values))
        except AssertionError:
            return False
    return True


def _are_scratch(model: nn.Module, given: Mapping[str, Any], notes: list[tuple[Any, str]]) -> bool:
    """Whether the model computes the same whatever stood in these attributes before: it only writes notes there."""

    def run(poisoned: bool) -> Any:
        with keep_state(model), torch.no_grad():
            for attributes, name in notes if poisoned else ():
                attributes[name] = object()  # whoever reads this fails
            seed_all(0)
            return model(**map_tensors(torch.clone, Args(**given).first(2).kwargs))

    with keep_parameters(model) as overwritten:
        try:
            return same_bits(run(poisoned=False), run(poisoned=True)) and not overwritten()
        except Exception:
            return False


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch.export from printing a whole program and its warnings: what went wrong is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _unusual_batch(given: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat examples until their number is unlike every other size: else the program would take one for the other."""
    args = Args(**given)
    size = args.batch_size() or 1
    taken = {extent for tensor in args.tensors() for extent in tensor.shape}
    wanted = next(prime for prime in itertools.chain(_PRIMES, itertools.count(43, 2)) if prime not in taken)
    return args.map(lambda t: t[torch.arange(wanted, device=t.device) % size] if t.dim() else t).kwargs


def _free_batch(example: Mapping[str, Any]) -> dict[str, Any]:
    """Say which dimension of every input is the batch."""

    def free(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    return {name: pytree.tree_map(free, value) for name, value in example.items()}


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no reason given'}{user_line(error)}."
