"""Export of the inference graph to an ONNX file, which is checked with ONNX Runtime before it gets its name."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args
from sedona_fx.errors import ExportError
from sedona_fx.export.attention import unfuse_attention
from sedona_fx.extras import require
from sedona_fx.files import replacing

TOLERANCE = 1e-5
"""Largest difference from PyTorch that a float32 file may have, as a fraction of the largest output."""
ROUNDING = 10.0
"""The same where PyTorch itself is not that exact, as a multiple of its own difference from float64."""


def to_onnx(graph: fx.GraphModule, example: Args, path: str | Path, *, name: str, free_batch: bool) -> Path:
    """Export an inference graph (without heads and boundaries) with a dynamic batch size.

    ONNX Runtime runs the file on batches of 1, 2 and 5 examples, made from `example`, and the outputs are compared with
    PyTorch's. They may differ by 1e-5 of the largest output, or, for nets that magnify rounding errors, by ten times
    PyTorch's own rounding error. (Untrained nets often do; PyTorch then differs as much from itself on another batch
    size.) Only after this does the file replace what was at `path`.

    Args:
        graph: in eval mode; it is left as it is.
        example: a batch, every input as a keyword under the name of its placeholder.
        path: of the file.
        name: of the model, for messages.
        free_batch: whether the graph takes batches of any size. If not, the file takes the size of `example`, and is
            compared on `example` alone.

    Returns:
        The path.

    Raises:
        MissingExtraError: the packages of the extra ``onnx`` are not installed.
        ExportError: the graph cannot be exported, or the file does not compute what PyTorch computes.
    """
    for package in ("onnx", "onnxscript"):
        require(package, extra="onnx", purpose="exporting to ONNX")
    onnxruntime = require("onnxruntime", extra="onnx", purpose="checking an exported ONNX file")
    # A copy, because `cpu()` moves parameters in place, and the inference graph holds the net's own.
    module = copy.deepcopy(graph).cpu()
    inputs = {key: pytree.tree_map_only(Tensor, torch.Tensor.cpu, value) for key, value in example.kwargs.items()}
    batch = torch.export.Dim("batch", min=1)
    size = Args(**inputs).batch_size() if free_batch else None
    shapes = {
        key: pytree.tree_map(
            lambda t: {0: batch} if size is not None and isinstance(t, Tensor) and t.dim() > 0 else None, value
        )
        for key, value in inputs.items()
    }
    order = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    with replacing(path) as temporary:
        sample = tuple(_resized(inputs[key], size, 2) for key in order)
        try:
            with _quiet():
                _export(module, sample, tuple(shapes[key] for key in order), temporary)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise ExportError(
                f"{name} cannot be exported to ONNX: {type(error).__name__}: {reason}. "
                "torch.onnx.export on net.inference_module() shows the whole story."
            ) from error
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        for count in (1, 2, 5) if size is not None else (None,):
            _compare(module, session, [_resized(inputs[key], size, count) for key in order], str(path))
    return Path(path)


def _export(module: fx.GraphModule, inputs: tuple[Any, ...], shapes: tuple[Any, ...], path: Path) -> None:
    """Write a graph, or, if that fails and it has fused attention, a copy with attention in plain operators."""
    try:
        _write(module, inputs, shapes, path)
    except Exception:
        unfused = copy.deepcopy(module)
        if not unfuse_attention(unfused):
            raise
        _write(unfused, inputs, shapes, path)


def _write(module: fx.GraphModule, inputs: tuple[Any, ...], shapes: tuple[Any, ...], path: Path) -> None:
    torch.onnx.export(module, inputs, str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def _resized(value: Any, size: int | None, count: int | None) -> Any:
    """Return inputs of `size` examples as inputs of `count` examples, by leaving out or repeating some.

    If `size` or `count` is None they are returned as they are.
    """
    if size is None or count is None:
        return value
    return pytree.tree_map_only(
        Tensor, lambda t: t[torch.arange(count) % size].contiguous() if t.dim() > 0 else t, value
    )


def _compare(module: fx.GraphModule, session: Any, inputs: list[Any], path: str) -> None:
    """Run a graph and the exported file on the same inputs, and raise an ExportError if the outputs differ."""
    expected = _outputs(module, inputs)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    actual = session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})
    for index, (want, value) in enumerate(zip(expected, map(torch.from_numpy, actual), strict=True)):
        if want.shape != value.shape:
            raise ExportError(f"{path!r} gives the shape {tuple(value.shape)} where the net gives {tuple(want.shape)}.")
        if want.dtype.is_floating_point and want.numel():
            difference, allowed = _difference(value, want), TOLERANCE
            if not difference <= allowed:  # a NaN is too large as well
                allowed = max(allowed, ROUNDING * _rounding_error(module, inputs, index, want))
            if not difference <= allowed:
                raise ExportError(
                    f"{path!r} differs from the net by {difference:.1e} of its largest output (allowed: "
                    f"{allowed:.0e}) on {tuple(tensors[0].shape)}. It was not kept."
                )


def _outputs(module: fx.GraphModule, inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(module(*inputs)) if isinstance(t, Tensor)]


def _difference(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference as a fraction of the largest magnitude in `reference`."""
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value.to(reference.dtype) - reference).abs().max() / scale).item()


def _rounding_error(module: fx.GraphModule, inputs: list[Any], index: int, output: Tensor) -> float:
    """Return how far PyTorch's output `index` is from the same in float64; 0 if the net cannot run in float64."""
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        exact = _outputs(copy.deepcopy(module).double(), wide)[index]
    except RuntimeError:
        return 0.0
    return _difference(output, exact)


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
