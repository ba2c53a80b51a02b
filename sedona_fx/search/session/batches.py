"""Batches of a search: named by the inputs of a graph, and split into smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sedona_fx.data.sources import Source, to_device, users_data
from sedona_fx.rng import loader_streams

NamedBatch = tuple[dict[str, Any], Any]
"""The net's inputs by name, and the target."""

Batches = Callable[[], Iterator[NamedBatch]]
"""Starts an epoch of batches at every call."""


def split(batch: NamedBatch, size: int) -> list[NamedBatch]:
    """Split a batch into micro-batches of about `size` samples, which differ by one sample at most.

    Equal sizes, since a small remainder would have no useful batch statistics. A batch that has no two parts of `size`
    samples, or whose tensors differ in their first dimension, stays whole.
    """
    leaves, spec = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    samples = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if samples < 2 * size or any(t.dim() == 0 or t.shape[0] != samples for t in tensors):
        return [batch]
    count = samples // size
    split_leaves = [leaf.tensor_split(count) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([parts[k] for parts in split_leaves], spec) for k in range(count)]


@dataclass(frozen=True)
class NamedBatches:
    """Epochs of :func:`named_batches`.

    Attributes:
        source: the user's data.
        gm: graph whose placeholders name the inputs.
        device: where the batches are moved to.
    """

    source: Source
    gm: fx.GraphModule
    device: torch.device

    def __call__(self) -> Iterator[NamedBatch]:
        """Start an epoch."""
        return named_batches(self.source, self.gm, self.device)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that the user's own loader holds."""
        return loader_streams(users_data(self.source))


def named_batches(source: Source, gm: fx.GraphModule, device: torch.device) -> Iterator[NamedBatch]:
    """Yield the batches of one epoch on a device, the inputs by the names of a graph's placeholders."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    for args, target in source():
        values = {**dict(zip(names, args.args, strict=False)), **args.kwargs}
        yield to_device(values, device), to_device(target, device)
