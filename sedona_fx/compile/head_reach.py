"""Tell of heads of the user's own that read so little of an activation that weights of their block learn nothing.

The built-in heads read one token only where its gradient is sure to reach all of a block (:mod:`sedona_fx.ir.rows`). A
head from a factory of the user's may read anything: its gradient says which rows, and the graph what they depend on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.registry import head_name, is_built_in
from sedona_fx.heads.rows import Rows
from sedona_fx.ir.graph import TensorSpec, info
from sedona_fx.ir.rows.reach import missed_parameters
from sedona_fx.rng import seeded

_EXAMPLES = 4
_SHOWN = 3


def warn_of_missed(gm: fx.GraphModule, end: fx.Node, spec: HeadSpec, head: nn.Module, own: Collection[str]) -> None:
    """Warn if no gradient from a head of the user's own can reach a parameter of its block.

    Args:
        gm: the ANALYSED train graph.
        end: the node that the head reads.
        spec: what the head was made of.
        head: the head; it is left as it is.
        own: names of the parameters of its block that require a gradient.
    """
    if is_built_in(spec) or not own:
        return
    record = info(end)
    for dim, places in _rows_read(head, record.value, record.rows or Rows()).items():
        missed = set(missed_parameters(gm, end, dim, places, unknown_reads_all=True)).intersection(own)
        if missed:
            names = [name for name in own if name in missed]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            warnings.warn(
                f"the head {head_name(spec)!r} behind {info(end).cut!r} reads {len(places)} of "
                f"{info(end).value.shape[dim]} rows along dimension {dim}, which do not depend on "
                f"{', '.join(map(repr, names[:_SHOWN]))}{more}: these get no gradient from its loss. Let the head read "
                "all rows (their mean), or cut behind a layer that mixes them.",
                stacklevel=2,
            )
            return


def _rows_read(head: nn.Module, activation: TensorSpec, batch: Rows) -> dict[int, set[int]]:
    """Return, for each dimension of which a head does not read all rows, the rows that it reads.

    Args:
        head: the head.
        activation: what it reads in the net.
        batch: where that holds the examples.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_EXAMPLES, *activation.shape[1:]) if batch == Rows() else activation.shape
    x = torch.randn(shape, generator=generator).to(activation.device, activation.dtype).requires_grad_()
    with seeded(activation.device, 0), torch.enable_grad():
        try:
            output = copy.deepcopy(head)(x)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return {}
            (gradient,) = torch.autograd.grad(output, x, torch.randn_like(output), allow_unused=True)
        except Exception:  # it does not take noise: nothing is known of it
            return {}
    if gradient is None:
        return {}
    read: dict[int, set[int]] = {}
    for dim in set(range(len(shape))) - {batch.dim}:
        others = [other for other in range(len(shape)) if other != dim]
        places = gradient.ne(0).sum(others).nonzero().flatten().tolist()
        if 0 < len(places) < shape[dim]:
            read[dim] = set(places)
    return read
