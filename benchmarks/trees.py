"""Inputs and outputs of any model: a model is called with them, their tensors are found, changed and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]


def call(module: nn.Module, inputs: Any) -> Any:
    """Call a module as the training loops do: a tuple is positional, a mapping is keywords, else one argument."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def leaves(tree: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Return the tensors of nested mappings, sequences and dataclasses, each with the way to it."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, Mapping):
        children: Any = tree.items()
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        children = enumerate(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    else:
        return []
    return [leaf for key, value in children for leaf in leaves(value, (*path, key))]


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested value."""
    return [tensor for _, tensor in leaves(tree)]


def change(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return inputs (mappings, tuples and lists) with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: change(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(change(function, value) for value in tree)
    return tree


def doubled(tree: Any) -> Any:
    """Return inputs in float64; integers stay integers."""
    return change(lambda t: t.double() if t.is_floating_point() else t, tree)


def batch_size(inputs: Any) -> int | None:
    """Return the length that the first dimensions of all tensors have in common, or None."""
    sizes = {t.shape[0] for t in tensors(inputs) if t.dim()}
    return sizes.pop() if len(sizes) == 1 and not _is_list_of_examples(inputs) else None


def _is_list_of_examples(inputs: Any) -> bool:
    """Whether the batch is a list, as detectors have it: its tensors are one example each."""
    return isinstance(inputs, tuple) and any(isinstance(value, list) for value in inputs)


def resized(inputs: Any, count: int) -> Any:
    """Return `count` examples, made of those there are; real numbers get fresh noise on top."""
    source = torch.Generator().manual_seed(count)

    def take(t: Tensor) -> Tensor:
        if not t.dim():
            return t
        chosen = t[torch.arange(count) % len(t)]
        if chosen.is_floating_point():
            chosen = chosen + 0.5 * torch.randn(chosen.shape, generator=source).to(chosen.dtype)
        return chosen.contiguous()

    return change(take, inputs)


def difference(actual: Any, expected: Any, tolerance: float = 0.0) -> str:
    """Say where two outputs differ: in structure, shape, or by more than `tolerance` of the largest number; else ''.

    Without a tolerance every bit must be the same, NaN included.
    """
    ours, theirs = leaves(actual), leaves(expected)
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return f"returns tensors at {_paths(ours)}, the model at {_paths(theirs)}"
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        place = ".".join(map(str, path)) or "the output"
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{place} is {tuple(a.shape)} {a.dtype}, the model's {tuple(b.shape)} {b.dtype}"
        if same_bits(a, b):
            continue
        if not (distance(a, b) <= tolerance if tolerance else False):
            return f"{place} differs by {distance(a, b):.1e} of its largest number"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return torch.equal(a, b) or (
        a.shape == b.shape and a.is_floating_point() and bool(((a == b) | a.isnan() & b.isnan()).all())
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest number expected."""
    if not expected.numel():
        return 0.0
    wide = expected.detach().double()
    scale = wide.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.detach().double() - wide).abs().max() / scale)


def _paths(found: list[tuple[Path, Tensor]]) -> str:
    return ", ".join(".".join(map(str, path)) for path, _ in found)[:80] or "none"
