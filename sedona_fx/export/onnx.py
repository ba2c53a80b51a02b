"""Export of the inference graph to an ONNX file, which is checked with ONNX Runtime before it gets its name."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args
from sedona_fx.data.sizes import resized
from sedona_fx.errors import ExportError, first_line, shape_text
from sedona_fx.export.attention import unfuse_attention
from sedona_fx.export.chunks import slice_batch_chunks
from sedona_fx.export.dynamic import dynamic_shapes, fixed_text
from sedona_fx.export.flat import Flat, flat
from sedona_fx.export.model import compute_in_float32, rename, short_floats
from sedona_fx.export.parametrized import bake_parametrizations
from sedona_fx.extras import require
from sedona_fx.files import replacing
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.graph import copy_info
from sedona_fx.plan_values import Capture, FreeSize

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference from PyTorch that a float32 file may have, as a fraction of the largest output."""
ROUNDING = 10.0
"""The same where PyTorch itself is not that exact, as a multiple of its own difference from float64."""


def to_onnx(graph: fx.GraphModule, example: Args, path: str | Path, *, name: str, capture: Capture) -> Path:
    """Export an inference graph (without heads and boundaries) with a dynamic batch size.

    The other sizes of inputs that the graph leaves free are dynamic as well, and the file is compared at a second value
    of each. If that fails, they are fixed, which is logged.

    Inputs of the file are the tensors in the arguments, ``x`` or ``batch.ids``; its outputs those in what the model
    returns, ``logits`` or ``hidden.0``, or ``output`` if it returns a bare tensor. Other values are left out. Weights
    have the names that they have in the net, and parametrized ones (weight norm) the values that they have now.

    ONNX Runtime runs the file on batches of 1, 2 and 5 examples, made from `example`, and the outputs are compared with
    PyTorch's. They may differ by 1e-5 of the largest output, or, for nets that magnify rounding errors, by ten times
    PyTorch's own rounding error. (Untrained nets often do; PyTorch then differs as much from itself on another batch
    size.) Only after this does the file replace what was at `path`.

    Args:
        graph: in eval mode, on the CPU; a copy of the caller's, which is changed.
        example: a batch, every input as a keyword under the name of its placeholder.
        path: of the file.
        name: of the model, for messages.
        capture: says whether the graph takes batches of any size, and which other sizes of inputs are free. If the
            batch is fixed, the file takes the size of `example`, and is compared on `example` alone.

    Returns:
        The path.

    Raises:
        MissingExtraError: the packages of the extra ``onnx`` are not installed.
        ExportError: the graph cannot be exported, or the file does not compute what PyTorch computes.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="onnx", purpose="exporting to ONNX")
    with torch.autocast("cpu", enabled=False):  # none of the caller's
        return _checked(graph, example, Path(path), name=name, capture=capture)


def _checked(graph: fx.GraphModule, example: Args, path: Path, *, name: str, capture: Capture) -> Path:
    bake_parametrizations(graph)
    slice_batch_chunks(graph)
    order = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = {key: pytree.tree_map_only(Tensor, torch.Tensor.cpu, example.kwargs[key]) for key in order}
    size = Args(**inputs).batch_size() if capture.free_batch else None
    module = Flat(graph, inputs)
    counts = (2, 1, 5) if size is not None else (None,)

    def samples_of(given: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        return [flat({key: _resized(value, size, count) for key, value in given.items()}) for count in counts]

    samples = samples_of(inputs)
    _check_dtypes(module, samples[0], name)
    free = capture.free_sizes if size is not None else ()
    with replacing(path) as temporary:
        other = resized(inputs, free) if free else None
        if other is not None:
            try:
                file = _written(module, samples[0], temporary, name=name, free_batch=True, free_sizes=free)
                for sample in (*samples, *samples_of(other)):
                    _compare(module, file, sample, str(path))
                return path
            except ExportError as error:
                log.warning("%s: %s. %s", name, fixed_text(inputs, free), first_line(error))
        file = _written(module, samples[0], temporary, name=name, free_batch=size is not None)
        for sample in samples:
            _compare(module, file, sample, str(path))
    return path


def _written(
    module: Flat,
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    name: str,
    free_batch: bool,
    free_sizes: Sequence[FreeSize] = (),
) -> _File:
    """Return the file that a graph is exported to."""
    try:
        with _quiet():
            exported = _export(module, inputs, dynamic_shapes(module, inputs, free_batch, free_sizes))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(
            f"{name} cannot be exported to ONNX: {type(error).__name__}: {reason}. "
            "torch.onnx.export on net.inference_module() shows the whole story."
        ) from error
    return _File(exported, path, name)


def _export(module: Flat, inputs: tuple[Tensor, ...], shapes: Any) -> Any:
    """Return the ONNX program of a graph, or, if that fails and it has fused attention, of one in plain operators."""
    try:
        return _exported(module, inputs, shapes)
    except Exception:
        unfused = deep_copy(module)
        assert isinstance(unfused.program, fx.GraphModule)
        if not unfuse_attention(unfused.program):
            raise
        return _exported(unfused, inputs, shapes)


def _exported(module: Flat, inputs: tuple[Tensor, ...], shapes: Any) -> Any:
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    assert program is not None
    rename(program.model, inputs=module.inputs, outputs=module.outputs, inside="program.")
    return program


class _File:
    """A written file, as ONNX Runtime runs it.

    Args:
        exported: the program that is written. If ONNX Runtime cannot run it, what it computes in short floats is
            computed in float32 and rounded, as PyTorch does on a CPU.
        path: of the file.
        name: of the model, for messages.

    Attributes:
        tolerance: the largest difference from PyTorch that it may have, as a fraction of the largest output: 1e-5, or
            the precision of the shortest floats in it.

    Raises:
        ExportError: ONNX Runtime cannot run it.
    """

    def __init__(self, exported: Any, path: Path, name: str) -> None:
        onnxruntime = require("onnxruntime", extra="onnx", purpose="checking an exported ONNX file")
        self.tolerance = max([TOLERANCE, *(torch.finfo(getattr(torch, f)).eps for f in short_floats(exported.model))])

        def session() -> Any:
            exported.save(str(path), external_data=False)
            return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        try:
            try:
                self._session = session()
            except Exception:
                if not compute_in_float32(exported.model):
                    raise
                self._session = session()
        except Exception as error:
            raise ExportError(f"{name} was exported, but ONNX Runtime cannot run it: {first_line(error)}.") from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for inputs.

        Raises:
            ExportError: ONNX Runtime cannot run them.
        """
        names = [entry.name for entry in self._session.get_inputs()]
        try:
            values = self._session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
        except Exception as error:
            shapes = ", ".join(shape_text(t.shape) for t in inputs)
            raise ExportError(f"ONNX Runtime cannot run the file on {shapes}: {first_line(error)}.") from error
        return [torch.from_numpy(value) for value in values]


def _check_dtypes(module: Flat, inputs: Sequence[Tensor], name: str) -> None:
    """Raise an ExportError if an input or output has a dtype that NumPy lacks, as the file could not be checked."""
    given, returned = (
        zip(module.inputs, inputs, strict=True),
        zip(module.outputs, _outputs(module, inputs), strict=True),
    )
    for what, (key, tensor) in [*(("input", pair) for pair in given), *(("output", pair) for pair in returned)]:
        try:
            tensor.numpy()
        except TypeError:
            raise ExportError(
                f"the {what} {key!r} of {name} is {tensor.dtype}, which NumPy does not have, so that the file could "
                "not be checked. Let the model take and return float32; inside, it may compute in other dtypes."
            ) from None


def _resized(value: Any, size: int | None, count: int | None) -> Any:
    """Return inputs of `size` examples as inputs of `count` examples, by leaving out or repeating some.

    If `size` or `count` is None they are returned as they are.
    """
    if size is None or count is None:
        return value
    return pytree.tree_map_only(
        Tensor, lambda t: t[torch.arange(count) % size].contiguous() if t.dim() > 0 else t, value
    )


def _compare(module: Flat, file: _File, inputs: tuple[Tensor, ...], path: str) -> None:
    """Run a graph and the exported file on the same inputs, and raise an ExportError if the outputs differ."""
    expected = _outputs(module, inputs)
    rounded: list[Sequence[Tensor]] | None = None
    for index, (want, value) in enumerate(zip(expected, file.run(inputs), strict=True)):
        what = f"{path!r} gives the output {module.outputs[index]!r} "
        if (want.shape, want.dtype) != (value.shape, value.dtype):
            raise ExportError(
                f"{what} as {value.dtype} {tuple(value.shape)} where the net gives {want.dtype} {tuple(want.shape)}."
            )
        difference, allowed = _difference(value, want), file.tolerance
        if not difference <= allowed:  # a NaN is too large as well
            rounded = _with_less_rounding(module, inputs) if rounded is None else rounded
            errors = [_difference(want, outputs[index].to(want.dtype)) for outputs in rounded]
            allowed = max([allowed, *(ROUNDING * error for error in errors)])
        if not difference <= allowed:
            raise ExportError(
                f"{path!r} differs from the net by {difference:.1e} of its largest output (allowed: "
                f"{allowed:.0e}) on {tuple(inputs[0].shape)}. It was not kept."
            )


def _outputs(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(module(*inputs))


def _difference(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference as a fraction of the largest magnitude in `reference`; integers have to be equal.

    Infinite numbers have to be equal, too.
    """
    if not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else math.inf
    gap = (value.to(reference.dtype) - reference).abs().masked_fill(value == reference, 0.0)
    scale = reference[reference.isfinite()].abs()
    tiny = torch.finfo(reference.dtype).tiny
    return (gap.max() / scale.max().clamp_min(tiny)).item() if gap.numel() and scale.numel() else gap.sum().item()


def _with_less_rounding(module: Flat, inputs: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return what PyTorch gives in float64, and without the casts of autocast regions; not where the net cannot run so.

    How far its outputs are from these says how much is rounding.
    """
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    results: list[Sequence[Tensor]] = []
    for exact, values in ((deep_copy(module).double(), wide), (_without_casts(module), inputs)):
        with contextlib.suppress(RuntimeError):
            results.append(_outputs(exact, values))
    return results


def _without_casts(module: Flat) -> Flat:
    """Return a copy of a graph without its regions."""
    plain = deep_copy(module)
    assert isinstance(plain.program, fx.GraphModule)
    for node in plain.program.graph.nodes:
        copy_info(node, node, region=None)
    plain.program.recompile()
    return plain


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress report, log messages and warnings, which are about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
