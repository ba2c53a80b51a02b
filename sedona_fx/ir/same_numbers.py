"""When two nested values hold the same numbers: bit for bit, or up to a part of their norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedona_fx.data.args import same_plain
from sedona_fx.ir.outputs import fields


def near(first: Tensor, second: Tensor | None, tolerance: float) -> bool:
    """Whether two gradients are equal up to a part of the norm of the first, and not finite in the same places."""
    if second is None:
        return False
    if bool(((second - first).norm() <= tolerance * first.norm()).item()):
        return True
    finite = first.isfinite()
    if bool(finite.all()) or first.shape != second.shape or not torch.equal(finite, second.isfinite()):
        return False
    return near(torch.where(finite, first, 0), torch.where(finite, second, 0), tolerance)


def _equal_but_for_nan(first: Tensor, second: Tensor) -> bool:
    """Whether tensors of one shape and dtype have NaN in the same places, and the same numbers in all others."""
    if not (first.is_floating_point() or first.is_complex()):
        return False
    nan, other = first.isnan(), second.isnan()
    return torch.equal(nan, other) and torch.equal(first.masked_fill(nan, 0), second.masked_fill(nan, 0))


def same_bits(first: Any, second: Any) -> bool:
    """Return whether two nested values hold the same numbers, NaN equal to NaN.

    Types are not compared: a graph returns fx's own lists and dictionaries.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.shape == second.shape
            and first.dtype == second.dtype
            and (torch.equal(first, second) or _equal_but_for_nan(first, second))
        )
    first_items, second_items = fields(first), fields(second)
    if first_items and first_items[0][0] is None:  # not nested
        return first is second or same_plain(first, second)
    return [key for key, _ in first_items] == [key for key, _ in second_items] and all(
        same_bits(a, b) for (_, a), (_, b) in zip(first_items, second_items, strict=True)
    )
