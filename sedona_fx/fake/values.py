"""Nested values in a run on fake tensors: the tensors in one, containers that may be written to, noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict
from torch.utils import _pytree as pytree

from sedona_fx.fake.tensors import Abstract


def mutable(value: Any) -> Any:
    """Return a nested value with Python's own containers in place of fx's immutable ones."""
    if isinstance(value, list):
        return [mutable(item) for item in value]
    if type(value) is tuple:
        return tuple(map(mutable, value))
    if isinstance(value, immutable_dict):
        return {key: mutable(item) for key, item in value.items()}
    return value


def made_up(fake: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor with numbers like a fake one: noise if it holds floats, else zeros."""
    if is_float(fake):
        kind = torch.complex64 if fake.dtype.is_complex else torch.float32
        noise = torch.randn(fake.shape, generator=generator, dtype=kind).to(fake.dtype).to(fake.device)
        return noise.requires_grad_(fake.requires_grad).clone()  # not an autograd leaf: the module may write to it
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, which autograd can follow."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def hands_on(given: Iterable[Any], result: Any) -> bool:
    """Whether a result has one of the given tensors itself in it, as that of ``x.float()`` has if x is float32."""
    ids = {id(_made(tensor)) for tensor in given}
    return any(id(_made(tensor)) in ids for tensor in tensors_in(result))


def _made(tensor: Any) -> Any:
    return tensor.made if isinstance(tensor, Abstract) and tensor.made is not None else tensor


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors of a nested value, abstract ones included."""
    if isinstance(value, Tensor | Abstract):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor | Abstract)]
