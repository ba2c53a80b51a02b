"""Inputs of other sizes than those at hand, made of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sedona_fx.plan_values import FreeSize


def resized(arguments: Mapping[str, Any], sizes: tuple[FreeSize, ...]) -> dict[str, Any] | None:
    """Return the arguments with another value for every free size, made of the same numbers; None if there is none.

    Sizes that need not be equal differ, so that nothing is taken for right that holds by chance.
    """
    values = dict(arguments)
    chosen: dict[str, int] = {}
    for size in sizes:
        extent = arguments[size.name].shape[size.dim]
        if size.symbol not in chosen:
            group = [other for other in sizes if other.symbol == size.symbol]
            least, most = max(s.least for s in group), min((s.most for s in group if s.most is not None), default=None)
            options = [extent - 1, extent + 1, extent - 2, extent + 2, extent + 3, extent + 4]
            fitting = [n for n in options if n >= least and (most is None or n <= most) and n not in chosen.values()]
            if not fitting:
                return None
            chosen[size.symbol] = fitting[0]
        index = torch.arange(chosen[size.symbol], device=values[size.name].device) % extent
        values[size.name] = values[size.name].index_select(size.dim, index)
    return values
