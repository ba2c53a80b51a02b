"""What is needed of a value: nothing, all, some rows of a tensor, or elements of a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple

from torch import fx

from sedona_fx.ir.graph import TensorSpec, info


class Amount(Enum):
    """How much of a value is needed, where that is not some rows."""

    NOTHING = 0
    ALL = 1


class Rows(NamedTuple):
    """Rows of a tensor: the places `places` along dimension `dim`."""

    dim: int
    places: frozenset[int]


class Item(NamedTuple):
    """An element of a tuple: `need` of the element `place`."""

    place: int
    need: Amount | Rows


Part = Rows | Item
Need = Amount | frozenset[Part]
"""All, nothing, or several parts."""
NOTHING, ALL = Amount.NOTHING, Amount.ALL
Needs = dict[fx.Node, Need]
"""What is needed of each input of a node."""

Rule = Callable[[fx.GraphModule, fx.Node, Part], Needs | None]
"""Returns what is needed of inputs for a part of a node's value; of those left out, all. None: it cannot tell."""


def rows(dim: int, places: Iterable[int]) -> Need:
    """Return the need of some rows."""
    wanted = frozenset(places)
    return frozenset({Rows(dim, wanted)}) if wanted else NOTHING


def joined(first: Need, second: Need) -> Need:
    """Return what is needed by two readers together."""
    if first is ALL or second is ALL:
        return ALL
    if first is NOTHING or second is NOTHING:
        return second if first is NOTHING else first
    assert isinstance(first, frozenset)
    assert isinstance(second, frozenset)
    return first | second


def parts_of(node: fx.Node, need: Need) -> Need:
    """Return the need with the rows of one dimension put together, and ALL in the place of all rows."""
    if not isinstance(need, frozenset):
        return need
    shape = shape_of(node)
    places: dict[int, frozenset[int]] = {}
    for part in need:
        if isinstance(part, Rows):
            places[part.dim] = places.get(part.dim, frozenset()) | part.places
    if shape is not None and any(len(found) >= shape[dim] for dim, found in places.items()):
        return ALL
    return frozenset({*(Rows(*item) for item in places.items()), *(part for part in need if isinstance(part, Item))})


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a node's value, if that is one tensor."""
    value = info(node).value if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, TensorSpec) else None


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, by its position or its name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def aligned(source: fx.Node, part: Rows, shape: tuple[int, ...]) -> Need:
    """Return what is needed of an input that is broadcast to the shape of a result."""
    own = shape_of(source)
    dim = part.dim - len(shape) + len(own) if own is not None else -1
    if own is None or dim < 0 or own[dim] != shape[part.dim]:
        return ALL  # broadcast: each row has all of it
    return rows(dim, part.places)
