"""Regions of a forward pass: ``with torch.autocast(...)`` and ``with torch.no_grad()``, recorded at every node in them.

A node's record says in which region the node runs. There are no nodes that enter and leave a region: such a pair could
be torn apart when nodes are sorted by block, and an error between the two would leave the process in the region. The
``with`` statements are made when the code of a graph is generated, around each run of nodes of one region.

Autocast remembers the weights that it has cast until the outermost region is left, and adds up the gradients of all
their uses in the low precision. So regions inside of one that is entered once stand inside of one statement, and two
that are entered one after the other do not become one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

INFO = "sedona"
"""Key of :class:`~sedona_fx.ir.graph.NodeInfo` in ``node.meta``."""
_NODE_STARTS = re.compile(r"# COUNTER: (\d+)\n")
"""The mark that fx puts before the code of a node, and removes again."""


@dataclass(frozen=True)
class Cast:
    """What ``torch.autocast`` is set to for one type of device.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``, ...
        enabled: whether it casts.
        dtype: to what it casts; None: to what it casts to outside of the region.
        cache: whether it remembers weights that it has cast; None: as outside.
    """

    device_type: str
    enabled: bool
    dtype: torch.dtype | None = None
    cache: bool | None = None

    @property
    def possible(self) -> bool:
        """Whether PyTorch has autocast for such devices (not for ``meta``); where not, nothing is cast anyway."""
        return torch.amp.is_autocast_available(self.device_type)

    @property
    def code(self) -> str:
        """The expression of the context manager."""
        dtype = f"dtype={self.dtype}, " if self.enabled and self.dtype is not None else ""
        cache = f", cache_enabled={self.cache}" if self.cache is not None else ""
        return f"torch.autocast({self.device_type!r}, {dtype}enabled={self.enabled}{cache})"

    def context(self) -> Any:
        """Return the context manager."""
        dtype = self.dtype if self.enabled else None
        return torch.autocast(self.device_type, dtype=dtype, enabled=self.enabled, cache_enabled=self.cache)


@dataclass(frozen=True)
class Entry:
    """An autocast region inside of no other one, as it is entered.

    Attributes:
        number: counts the entries of one forward pass.
        cast: its settings.
    """

    number: int
    cast: Cast


@dataclass(frozen=True)
class Region:
    """How a node runs where that is not left to the caller.

    Attributes:
        grad: whether autograd records; None: as outside. ``torch.inference_mode`` counts as ``torch.no_grad``, which
            computes the same numbers.
        casts: the settings of autocast, at most one a type of device.
        entry: the outermost autocast region around; it is no part of what the region is equal to.
    """

    grad: bool | None = None
    casts: tuple[Cast, ...] = ()
    entry: Entry | None = field(default=None, compare=False, repr=False)

    @property
    def code(self) -> str:
        """What stands between ``with`` and the colon; empty if nothing is to be set here."""
        grad = [] if self.grad is None else ["torch.enable_grad()" if self.grad else "torch.no_grad()"]
        return ", ".join([*(cast.code for cast in self.casts if cast.possible), *grad])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body in the region."""
        with ExitStack() as stack:
            for cast in filter(lambda c: c.possible, self.casts):
                stack.enter_context(cast.context())
            if self.grad is not None:
                stack.enter_context(torch.enable_grad() if self.grad else torch.no_grad())
            yield

    def inside(self, outer: Region | None) -> Region:
        """Return what holds in this region if it stands in another one: the inner settings hide the outer ones."""
        if outer is None:
            return self
        casts = {cast.device_type: cast for cast in (*outer.casts, *self.casts)}
        return Region(outer.grad if self.grad is None else self.grad, tuple(casts.values()), outer.entry or self.entry)

    def moved(self, before: str, after: str) -> Region:
        """Return the region of a node that moves from devices of one type to those of another.

        What it says of other types of devices stays, and so does everything if it says something of the new type.
        """
        if any(cast.device_type == after for cast in self.casts):
            return self

        def moved(cast: Cast) -> Cast:
            return replace(cast, device_type=after) if cast.device_type == before else cast

        entry = self.entry and replace(self.entry, cast=moved(self.entry.cast))
        return Region(self.grad, tuple(map(moved, self.casts)), entry)


def region_of(node: fx.Node) -> Region | None:
    """Return the region that a node runs in; None: it runs as the caller runs the graph."""
    if node.op in ("placeholder", "get_attr", "output"):  # a value that enters a block has the record of its source
        return None
    return getattr(node.meta.get(INFO), "region", None)


class Root(str):
    """The text ``self`` in the code of a graph made here, so that whoever writes the code knows it from any other."""


class RegionCode(fx.graph.CodeGen):
    """Generates the code of a graph with a ``with`` statement around the nodes of each region."""

    def _gen_python_code(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> Any:
        root = Root(root_module)
        regions: list[Region | None] = []
        for node in nodes:  # reading an attribute is the same anywhere: it does not end a region
            own = region_of(node)
            own = own if own is not None and own.code else None
            regions.append(regions[-1] if node.op == "get_attr" and regions else own)
        if not any(regions):
            return super()._gen_python_code(nodes, root, *args, **kwargs)
        transform = self._body_transformer

        def add_regions(body: list[str]) -> list[str]:
            return _with_statements(transform(body) if transform is not None else body, regions)

        self._body_transformer = add_regions
        try:
            return super()._gen_python_code(nodes, root, *args, **kwargs)
        finally:
            self._body_transformer = transform


def _with_statements(body: Iterable[str], regions: Sequence[Region | None]) -> list[str]:
    """Indent the lines of nodes with a region under a ``with`` statement, one for consecutive nodes of one region.

    Around consecutive regions in one entry of autocast there is another one.
    """
    text = "".join(body)
    before, *parts = _NODE_STARTS.split(text)
    lines, entries = [before], _shared_entries(regions)
    inside: tuple[Entry | None, Region | None, Entry | None] = (None, None, None)
    for number, code in zip(parts[::2], parts[1::2], strict=True):
        region, shared = regions[int(number)], entries[int(number)]
        place = (shared, region, region.entry if region is not None else None)
        outer, inner = "    " if shared is not None else "", "    " if region is not None else ""
        if shared is not None and shared != inside[0]:
            lines.append(f"with {shared.cast.code}:\n")
        if region is not None and place != inside:
            lines.append(f"{outer}with {region.code}:\n")
        inside = place
        lines.append(f"# COUNTER: {number}\n")
        lines += [f"{outer}{inner}{line}" for line in code.splitlines(keepends=True)]
    if len(parts) != 2 * len(regions):
        raise AssertionError("fx marks the code of nodes in another way than sedona_fx knows")
    return lines


def _shared_entries(regions: Sequence[Region | None]) -> list[Entry | None]:
    """Return for every node the entry that has a statement around several regions; None where it has only one."""
    found: list[Entry | None] = []
    for entry, run in itertools.groupby(regions, key=lambda region: region.entry if region is not None else None):
        inner = list(run)
        shared = entry is not None and entry.cast.possible and len(set(inner)) > 1
        found += [entry if shared else None] * len(inner)
    return found


def new_graph() -> fx.Graph:
    """Return an empty graph whose code has the regions of its nodes."""
    graph = fx.Graph()
    graph.set_codegen(RegionCode())
    return graph
