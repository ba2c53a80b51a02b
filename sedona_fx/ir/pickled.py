"""Programs from pickles: fx makes a graph module again by tracing its code; here its regions are traced as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.ir.graph import INFO, NodeInfo
from sedona_fx.ir.region import Cast, Entry, Region, RegionCode


def from_pickle(body: dict[str, Any], imports: str, kind: type[fx.GraphModule]) -> nn.Module:
    """Return a program for what ``fx.GraphModule.__reduce__`` gives.

    Args:
        body: the attributes of the program, without its graph.
        imports: the imports of its code.
        kind: class of the program.
    """
    forward = fx.graph_module._forward_from_src(imports + body["_code"], {})
    noted = _NotedTorch()
    forward.__globals__["torch"] = noted

    class Tracer(fx.Tracer):
        def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
            graph = super().trace(*args, **kwargs)
            graph.set_codegen(RegionCode())
            return graph

        def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
            node = super().create_node(*args, **kwargs)
            node.meta[INFO] = NodeInfo(region=noted.region)
            return node

    return fx.graph_module._deserialize_graph_module(forward, {**body, "_tracer_cls": Tracer}, kind)


class _NotedTorch:
    """Stands for the module ``torch`` in generated code: its ``with`` statements only note the region."""

    def __init__(self) -> None:
        self.region: Region | None = None
        self._entries = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def autocast(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> Any:
        """Note what ``torch.autocast`` is asked for."""
        cast = Cast(device_type, enabled, dtype, cache_enabled)
        self._entries += 1
        return self._in(Region(casts=(cast,), entry=Entry(self._entries, cast)))

    def no_grad(self) -> Any:
        """Note that gradients are off."""
        return self._in(Region(False))

    def enable_grad(self) -> Any:
        """Note that gradients are on."""
        return self._in(Region(True))

    @contextmanager
    def _in(self, region: Region) -> Iterator[None]:
        before, self.region = self.region, region.inside(self.region)
        try:
            yield
        finally:
            self.region = before
