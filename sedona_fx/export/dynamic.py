"""Which sizes of inputs an ONNX file leaves free: that of the batch, and those that a captured net leaves free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sedona_fx.export.flat import Flat
from sedona_fx.plan_values import FreeSize


def dynamic_shapes(
    module: Flat, inputs: Sequence[Tensor], free_batch: bool, free_sizes: Sequence[FreeSize]
) -> tuple[dict[int, Any] | None, ...]:
    """Return for each input which of its dimensions have a symbol in the file, and which."""
    batch = torch.export.Dim("batch", min=1)
    symbols = {}
    for size in free_sizes:
        group = [other for other in free_sizes if other.symbol == size.symbol]
        most = min((other.most for other in group if other.most is not None), default=None)
        least = max(other.least for other in group)
        symbols[size.symbol] = torch.export.Dim(size.symbol, min=least, **({} if most is None else {"max": most}))
    shapes = []
    for name, tensor in zip(module.inputs, inputs, strict=True):
        dims = {0: batch} if free_batch and tensor.dim() > 0 else {}
        dims |= {size.dim: symbols[size.symbol] for size in free_sizes if size.name == name}
        shapes.append(dims or None)
    return tuple(shapes)


def fixed_text(inputs: Mapping[str, Any], free: Sequence[FreeSize]) -> str:
    """Return which sizes that are free in the net are fixed in a file."""
    sizes = ", ".join(f"dimension {s.dim} of {s.name!r} to {inputs[s.name].shape[s.dim]}" for s in free)
    return f"the ONNX file fixes {sizes}, which the net leaves free"
