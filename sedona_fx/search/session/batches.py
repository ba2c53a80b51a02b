"""Batches in smaller parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sedona_fx.data.sources import Source, to_device, users_data
from sedona_fx.rng import loader_streams


def split(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into parts of about `size` samples; not if its tensors differ in their first dimension.

    Parts differ by one sample at most: a small one left over would have no batch statistics to speak of.
    """
    leaves, spec = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    count = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if count < 2 * size or any(t.dim() == 0 or t.shape[0] != count for t in tensors):
        return [batch]
    pieces = [leaf.tensor_split(count // size) if isinstance(leaf, Tensor) else None for leaf in leaves]
    return [
        pytree.tree_unflatten([leaf if cut is None else cut[k] for leaf, cut in zip(leaves, pieces, strict=True)], spec)
        for k in range(len(next(cut for cut in pieces if cut is not None)))
    ]


Batch = tuple[dict[str, Any], Any]


Batches = Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class NamedBatches:
    """Epochs of :func:`named_batches`."""

    source: Source
    gm: fx.GraphModule
    device: torch.device

    def __call__(self) -> Iterator[Batch]:
        """Start an epoch."""
        return named_batches(self.source, self.gm, self.device)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that the user's own loader holds."""
        return loader_streams(users_data(self.source))


def named_batches(source: Source, gm: fx.GraphModule, device: torch.device) -> Iterator[Batch]:
    """Go through one epoch, the inputs by the names of a graph's placeholders."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    for args, target in source():
        values = {**dict(zip(names, args.args, strict=False)), **args.kwargs}
        yield to_device(values, device), to_device(target, device)
