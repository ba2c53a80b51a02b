"""What the model returned for a few examples, in the shapes that it returns for the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.ir.graph import TensorSpec
from sedona_fx.ir.outputs import leaves, map_tensors


def repeated_to(few: Any, specs: Any) -> Any:
    """Return an output with its rows repeated until it has the shapes of another one of the same model.

    Losses and targets can depend on the batch in any way: as many classes as examples, one row a token. So they are
    tried on shapes that occur, with numbers that occur, and without a forward pass of the whole batch.

    Args:
        few: what the model returned for a few examples.
        specs: what the graph returns for the whole batch, a :class:`~sedona_fx.ir.graph.TensorSpec` for every tensor.

    Returns:
        The output; None if the two do not hold the same tensors.
    """
    wanted = [leaf for leaf in pytree.tree_leaves(specs) if isinstance(leaf, TensorSpec)]
    tensors = [leaf for leaf in leaves(few) if isinstance(leaf, Tensor)]
    pairs = list(zip(tensors, wanted, strict=False))
    alike = all(t.dtype == spec.dtype and t.dim() == len(spec.shape) and t.numel() for t, spec in pairs)
    if len(tensors) != len(wanted) or not alike:
        return None
    repeated = {id(tensor): _repeated(tensor, spec.shape) for tensor, spec in pairs}
    return map_tensors(lambda tensor: repeated[id(tensor)], few)


def _repeated(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for dim, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size != wanted:
            tensor = tensor.index_select(dim, torch.arange(wanted, device=tensor.device) % size)
    return tensor
