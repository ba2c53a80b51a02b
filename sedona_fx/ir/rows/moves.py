"""Rows of operations that move numbers and compute none: concatenations, reshapes, permutations, indexing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import fx

from sedona_fx.ir.channels import permutation
from sedona_fx.ir.graph import TensorSpec, info, operation
from sedona_fx.ir.rows.need import (
    ALL,
    NOTHING,
    Item,
    Need,
    Needs,
    Part,
    Rows,
    aligned,
    argument,
    joined,
    rows,
    shape_of,
)


def concatenation(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``cat`` takes its rows from one tensor after the other."""
    given = _tensors_and_dim(node)
    if given is None or not isinstance(part, Rows):
        return None
    tensors, dim = given
    needs: Needs = {}
    start = 0
    for tensor in tensors:
        wanted = part.places
        if part.dim == dim:
            wanted = frozenset(place - start for place in part.places if start <= place < start + tensor.shape[dim])
            start += tensor.shape[dim]
        needs[tensor.node] = joined(needs.get(tensor.node, NOTHING), tensor.need(rows(part.dim, wanted)))
    return needs


def stack(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``stack`` makes a row of each tensor."""
    given = _tensors_and_dim(node)
    if given is None or not isinstance(part, Rows):
        return None
    tensors, dim = given
    needs: Needs = {}
    for place, tensor in enumerate(tensors):
        wanted: Need = rows(part.dim - (part.dim > dim), part.places)
        if part.dim == dim:
            wanted = ALL if place in part.places else NOTHING
        needs[tensor.node] = joined(needs.get(tensor.node, NOTHING), tensor.need(wanted))
    return needs


class _Joined(NamedTuple):
    """A tensor that is joined to others: the value of a node, or an element of one."""

    node: fx.Node
    place: int | None
    shape: tuple[int, ...]

    def need(self, wanted: Need) -> Need:
        """Return what is needed of the node for what is needed of the tensor."""
        if self.place is None or wanted is NOTHING:
            return wanted
        parts = wanted if isinstance(wanted, frozenset) else (ALL,)
        return frozenset(Item(self.place, part) for part in parts if not isinstance(part, Item))


def _tensors_and_dim(node: fx.Node) -> tuple[list[_Joined], int] | None:
    """Return the tensors that are joined, and the dimension along which they are."""
    tensors, dim, shape = argument(node, 0, "tensors"), argument(node, 1, "dim", 0), shape_of(node)
    if not isinstance(dim, int) or shape is None:
        return None
    if isinstance(tensors, fx.Node):
        specs = info(tensors).value
        if not isinstance(specs, (tuple, list)) or not all(isinstance(spec, TensorSpec) for spec in specs):
            return None
        return [_Joined(tensors, k, spec.shape) for k, spec in enumerate(specs)], dim % len(shape)
    if not isinstance(tensors, (tuple, list)):
        return None
    found = [_Joined(t, None, own) for t in tensors if isinstance(t, fx.Node) and (own := shape_of(t)) is not None]
    return (found, dim % len(shape)) if len(found) == len(tensors) else None


def expansion(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``expand`` repeats the only row of a dimension."""
    source, shape = node.args[0], shape_of(node)
    if not isinstance(part, Rows) or shape is None or not isinstance(source, fx.Node):
        return None
    return {source: aligned(source, part, shape)}


def reshape(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """A dimension of the result is one of the source, or has been split off from one."""
    source, shape = node.args[0], shape_of(node)
    own = shape_of(source)
    if not isinstance(part, Rows) or shape is None or own is None or not isinstance(source, fx.Node):
        return None
    size, behind = shape[part.dim], math.prod(shape[part.dim + 1 :])
    for dim, length in enumerate(own):
        own_behind = math.prod(own[dim + 1 :])
        # A place of the result is (number // behind) % size, where the number is that of the element.
        if own_behind and behind % own_behind == 0 and length * own_behind % (behind * size) == 0:
            inner = behind // own_behind
            return {source: rows(dim, (p for p in range(length) if p // inner % size in part.places))}
    return None


def permuted(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``permute`` and ``transpose``."""
    source, shape = node.args[0], shape_of(node)
    order = permutation(gm, node, len(shape)) if shape is not None else None
    if not isinstance(part, Rows) or order is None or not isinstance(source, fx.Node):
        return None
    return {source: rows(order[part.dim], part.places)}


def parts(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """``unbind``, ``chunk`` and ``split`` along a dimension give the elements of a tuple."""
    source, specs, name = node.args[0], info(node).value, operation(node)
    own, dim = shape_of(source), argument(node, 1 if name == "unbind" else 2, "dim", 0)
    if not isinstance(part, Item) or own is None or not isinstance(specs, (tuple, list)) or not isinstance(dim, int):
        return None
    assert isinstance(source, fx.Node)
    dim %= len(own)
    sizes = [1 if name == "unbind" else spec.shape[dim] for spec in specs]
    index = part.place % len(sizes)
    start, wanted = sum(sizes[:index]), part.need
    if wanted is ALL:
        return {source: rows(dim, range(start, start + sizes[index]))}
    if not isinstance(wanted, Rows):
        return None
    if name != "unbind" and wanted.dim == dim:
        return {source: rows(dim, (start + place for place in wanted.places))}
    # Rows of another dimension, of this element alone: which element is not kept, but where they lie is.
    return {source: rows(wanted.dim + (name == "unbind" and wanted.dim >= dim), wanted.places)}


def picked(node: fx.Node, part: Part | None) -> Needs | None:
    """Return what is needed of the source of an operation that picks: ``x[:, 0]``, ``select``, ``slice``, ``tuple[0]``.

    Args:
        node: the operation.
        part: what is needed of the result; None: all.
    """
    source, name = node.args[0], operation(node)
    assert isinstance(source, fx.Node)
    own = shape_of(source)
    if own is None:  # an element of a tuple
        key, specs = node.args[1] if name == "getitem" else None, info(source).value
        if isinstance(key, slice) and isinstance(part, Item) and isinstance(specs, (tuple, list)):
            return {source: frozenset({part._replace(place=range(len(specs))[key][part.place])})}
        if not isinstance(key, int) or isinstance(part, Item):
            return None
        return {source: frozenset({Item(key, ALL if part is None else part)})}
    index: list[Any] = [slice(None)] * len(own)
    if name == "getitem":
        key = node.args[1]
        index = list(key) if isinstance(key, tuple) else [key]
    elif not isinstance(dim := argument(node, 1, "dim", 0), int):
        return None
    elif name == "select":
        index[dim] = argument(node, 2, "index")
    else:
        index[dim] = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step"))
    return _indexed(source, own, index, part)


def _indexed(source: fx.Node, own: tuple[int, ...], index: list[Any], part: Part | None) -> Needs | None:
    """Return what is needed of `x` in ``x[index]`` with numbers and slices: the rows that are picked, or kept rows."""
    missing = len(own) - sum(entry is not None and entry is not Ellipsis for entry in index)
    at = next((k for k, entry in enumerate(index) if entry is Ellipsis), len(index))
    index = [*index[:at], *[slice(None)] * missing, *index[at + 1 :]]
    kept: list[int | None] = []  # of each dimension of the result, the one that it is of
    places: list[range] = []
    for entry in index:
        if isinstance(entry, slice) and all(e is None or type(e) is int for e in (entry.start, entry.stop, entry.step)):
            kept.append(len(places))
            places.append(range(own[len(places)])[entry])
        elif type(entry) is int:
            places.append(range(own[len(places)])[entry : entry + 1 or None])
        elif entry is None:
            kept.append(None)
        else:
            return None
    if part is None:
        partial = [dim for dim, found in enumerate(places) if len(found) < own[dim]]
        if len(partial) > 1:
            return None
        return {source: rows(partial[0], places[partial[0]]) if partial else ALL}
    of = kept[part.dim] if isinstance(part, Rows) else None
    if of is None or not isinstance(part, Rows):
        return None
    return {source: rows(of, (places[of][place] for place in part.places))}
