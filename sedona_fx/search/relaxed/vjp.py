"""Vector-Jacobian products of one segment of an autograd graph that stays connected to what precedes it.

A segment starts at the values and weights that a block reads and ends at the values that it makes. A gradient taken at
the start of a segment must come through that segment alone, although other segments may read the same value or use the
same weight. So every segment reads through identity nodes of its own (:func:`with_own_nodes`). To the rest of the graph
these nodes are identities: second derivatives pass through them unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

Key = TypeVar("Key", bound=Hashable)
Leaf = tuple[str, int]
"""A tensor inside a named value: the value's name, and the tensor's index among the flattened parts of the value."""


def carries_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that autograd follows."""
    return isinstance(value, Tensor) and value.requires_grad


def live_tensors(values: Mapping[str, Any]) -> dict[Leaf, Tensor]:
    """Return the tensors that carry a gradient, of values that are tensors or tuples, lists and dicts of them."""
    leaves = {(name, k): leaf for name, value in values.items() for k, leaf in enumerate(pytree.tree_leaves(value))}
    return {key: leaf for key, leaf in leaves.items() if carries_gradient(leaf)}


def with_own_nodes(value: Any) -> Any:
    """Return the same value, with a new identity node for every tensor that carries a gradient. Nothing is copied."""
    return pytree.tree_map(lambda t: t.view_as(t) if carries_gradient(t) else t, value)


def reachable(roots: Iterable[Tensor], weights: Mapping[Key, Tensor], stop: Iterable[Tensor]) -> set[Key]:
    """Return which of `weights` any of `roots` depends on without passing through a tensor of `stop`.

    `weights` have to be nodes of this segment's own (:func:`with_own_nodes`). Nothing before the segment leads to them,
    so stopping at the segment's inputs loses nothing and saves the walk through the earlier graph.
    """
    edges = {key: get_gradient_edge(t) for key, t in weights.items()}  # alive while their nodes are compared
    key_of_node = {edge.node: key for key, edge in edges.items()}
    visited = {get_gradient_edge(t).node for t in stop if t.requires_grad}
    reached: set[Key] = set()
    todo = [get_gradient_edge(t).node for t in roots if t.requires_grad]
    while todo:
        node = todo.pop()
        if node in visited:
            continue
        visited.add(node)
        if node in key_of_node:
            reached.add(key_of_node[node])  # and no further: what follows belongs to earlier unrolled steps
        else:
            todo += [following for following, _ in node.next_functions if following is not None]
    return reached


def gradients(
    roots: Sequence[Tensor], wanted: Sequence[Tensor], cotangents: Sequence[Tensor] | None, create_graph: bool
) -> list[Tensor | None]:
    """Call `torch.autograd.grad`, answering `None` wherever there is no gradient.

    Args:
        roots: tensors to differentiate. All are walked in one call, also where one is an ancestor of another.
        wanted: tensors to differentiate with respect to.
        cotangents: one per root, of the root's shape. None: the roots are scalars, each with cotangent 1.
        create_graph: keep the result differentiable.

    Returns:
        ``sum_k (d root_k / d wanted)^T cotangent_k`` for each of `wanted`; `None` where that does not depend on it.
    """
    used = [k for k, t in enumerate(roots) if t.requires_grad]
    asked = [t for t in wanted if t.requires_grad] if used else []
    if not asked:
        return [None] * len(wanted)
    used_cotangents = None if cotangents is None else [cotangents[k] for k in used]
    results = iter(
        torch.autograd.grad(
            [roots[k] for k in used], asked, used_cotangents, create_graph=create_graph, allow_unused=True
        )
    )
    return [next(results) if t.requires_grad else None for t in wanted]


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape, 0-d and real: of complex ones, that of their real parts.

    A real loss changes by ``inner(gradient, t)`` along t; PyTorch's gradient by z is d/dRe z + i d/dIm z.
    """
    return (first * second.conj()).real.sum()


def present(keys: Iterable[Key], values: Iterable[Tensor | None]) -> dict[Key, Tensor]:
    """Pair keys with as many leading values as there are keys, leaving out the values that are `None`."""
    return {key: t for key, t in zip(keys, values, strict=False) if t is not None}


def accumulate(total: dict[Key, Tensor], more: Mapping[Key, Tensor]) -> None:
    """Add `more` to `total`, key by key. `total` changes; its tensors do not, since others may hold them."""
    for key, t in more.items():
        total[key] = total[key] + t if key in total else t
