"""Batches in smaller parts."""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.search.relaxed.state import Batch


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
