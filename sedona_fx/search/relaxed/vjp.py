"""Vector-Jacobian products of one stretch of a graph that stays connected to what lies in front of it.

A stretch starts at the values and weights it reads and ends at the values it makes. A gradient that is asked for at a
stretch's start must come through this stretch alone, although the same value may be read, and the same weight used, by
others too. So every stretch reads through nodes of its own (:func:`own_nodes`): to the rest of the graph they are
identities, which second derivatives pass as if they were not there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

Key = TypeVar("Key", bound=Hashable)
Leaf = tuple[str, int]  # a tensor of a named value: the value's name, the tensor's place among its flattened parts


def carries_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that autograd follows."""
    return isinstance(value, Tensor) and value.requires_grad


def live(values: Mapping[str, Any]) -> dict[Leaf, Tensor]:
    """Return the tensors that carry a gradient, of values that are tensors or tuples, lists and dicts of them."""
    leaves = {(name, k): t for name, v in values.items() for k, t in enumerate(pytree.tree_leaves(v))}
    return {leaf: t for leaf, t in leaves.items() if carries_gradient(t)}


def own_nodes(value: Any) -> Any:
    """Return the same value, with a node of its own for every tensor that carries a gradient. Nothing is copied."""
    return pytree.tree_map(lambda t: t.view_as(t) if carries_gradient(t) else t, value)


def reached(roots: Iterable[Tensor], weights: Mapping[Key, Tensor], stop: Iterable[Tensor]) -> set[Key]:
    """Return which of `weights` any of `roots` depends on without passing through a tensor of `stop`.

    `weights` are nodes of this stretch's own, so nothing in front of it leads to them: to stop there saves the walk.
    """
    edges = {key: get_gradient_edge(t) for key, t in weights.items()}  # alive while their nodes are compared
    keys = {edge.node: key for key, edge in edges.items()}
    seen = {get_gradient_edge(t).node for t in stop if t.requires_grad}
    found: set[Key] = set()
    todo = [get_gradient_edge(t).node for t in roots if t.requires_grad]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in keys:
            found.add(keys[node])  # and no further: behind it lie earlier unrolled steps
        else:
            todo += [below for below, _ in node.next_functions if below is not None]
    return found


def gradients(
    roots: Sequence[Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor] | None, create_graph: bool
) -> list[Tensor | None]:
    """`torch.autograd.grad` that answers `None` wherever there is no gradient to be had.

    Several roots, one an ancestor of the other perhaps, are walked in one call: sum_k (d root_k / d wanted)^T
    cotangent_k. Without cotangents the roots are scalars.
    """
    at = [k for k, t in enumerate(roots) if t.requires_grad]
    asked = [t for t in wanted if t.requires_grad] if at else []
    if not asked:
        return [None] * len(wanted)
    given = None if cotangents is None else [cotangents[k] for k in at]
    found = iter(
        torch.autograd.grad([roots[k] for k in at], asked, given, create_graph=create_graph, allow_unused=True)
    )
    return [next(found) if t.requires_grad else None for t in wanted]


def named(names: Iterable[Key], values: Iterable[Tensor | None]) -> dict[Key, Tensor]:
    """Put names to as many leading values as there are names, and drop those that are `None`."""
    return {n: t for n, t in zip(names, values, strict=False) if t is not None}


def add(total: dict[Key, Tensor], more: Mapping[Key, Tensor]) -> None:
    """Add `more` to `total` in place, key by key; the tensors themselves are left alone (others may hold them)."""
    for key, t in more.items():
        total[key] = total[key] + t if key in total else t
