"""Promise 8 as a check: ONNX Runtime gives what the untouched model gives, for batches of 1, 2 and 5."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trees import batch_size, call, distance, doubled, resized, tensors

import sedona_fx

TOLERANCE = 1e-5
ROUNDING = 10.0


def onnx(model: nn.Module, net: sedona_fx.Net, inputs: Any) -> str:
    """Say where the exported file differs from the model, or ''.

    Where a network magnifies rounding no file can be nearer to PyTorch than PyTorch is to itself: a difference above
    the tolerance is accepted up to ten times PyTorch's own distance from float64, as ``net.to_onnx`` does.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    with tempfile.TemporaryDirectory() as folder:
        file = net.to_onnx(Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(file), _options(onnxruntime), providers=["CPUExecutionProvider"])
    model = model.eval()
    for count in (1, 2, 5) if batch_size(inputs) is not None else (None,):
        batch = inputs if count is None else resized(inputs, count)
        with torch.no_grad():
            expected = tensors(call(model, batch))
        given = zip(session.get_inputs(), tensors(_in_order(model, batch)), strict=True)
        actual = [torch.from_numpy(a) for a in session.run(None, {i.name: t.numpy() for i, t in given})]
        if reason := _compare(model, batch, actual, expected):
            return f"batch of {count}: {reason}" if count is not None else reason
    return ""


def _in_order(model: nn.Module, inputs: Any) -> Any:
    """Return inputs in the order of the forward's arguments, which is that of the file."""
    return list(sedona_fx.Args.of(inputs).bind(model.forward).values())


def _options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def _compare(model: nn.Module, batch: Any, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    if len(actual) != len(expected):
        return f"the file returns {len(actual)} tensors, the model {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"output {index} has the shape {tuple(ours.shape)}, the model's {tuple(theirs.shape)}"
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"output {index} differs"
            continue
        off = distance(ours, theirs)
        if not off <= TOLERANCE and not off <= ROUNDING * _rounding(model, batch, index, theirs):
            return f"output {index} is off by {off:.1e} of the largest number"
    return ""


def _rounding(model: nn.Module, batch: Any, index: int, result: torch.Tensor) -> float:
    """Return how far PyTorch's result is from the same in float64."""
    with torch.no_grad():
        return distance(result, tensors(call(copy.deepcopy(model).double(), doubled(batch)))[index])
