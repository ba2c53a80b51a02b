"""Variants of a net's blocks that schedules need, such as blocks without heads; made when they are first asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from sedona_fx import passes
from sedona_fx.errors import ScheduleError
from sedona_fx.ir.graph import BlockGraph, cut_points, info
from sedona_fx.net.placing import redirect
from sedona_fx.passes.block_variants import show_layers, without_head
from sedona_fx.passes.cuts import resolve
from sedona_fx.runtime.block import Block

Modes = dict[bool, list[BlockGraph]]
"""Mode (True: train) -> the graph of each block."""


class Variants:
    """The variants of a net's blocks. They share the net's modules, and each is made once.

    Code that replaces tensors of the net has to apply the change to :meth:`graphs` as well
    (:mod:`sedona_fx.net.placing`).

    Args:
        analysed: mode (True: train) -> ANALYSED graph.
        blocks: of the net.
        cuts: names of the chosen cut points.
        traced_on: the device that operators of the ANALYSED graphs name.
    """

    def __init__(
        self,
        analysed: Mapping[bool, fx.GraphModule],
        blocks: Sequence[Block],
        cuts: Sequence[str],
        traced_on: torch.device,
    ) -> None:
        self.analysed, self.traced_on = dict(analysed), traced_on
        self._blocks, self._cuts = tuple(blocks), tuple(cuts)
        self._headless: Modes | None = None
        self._layers: Modes | None = None
        self._layer_names: dict[bool, list[tuple[str, ...]]] = {}
        self._segments: dict[tuple[int, bool], dict[bool, list[list[BlockGraph]]]] = {}

    def graphs(self) -> list[fx.GraphModule]:
        """Return the graphs of all variants made so far, and the ANALYSED graphs that others will be made from."""
        variants = [modes for modes in (self._headless, self._layers) if modes is not None]
        graphs = [graph for modes in variants for blocks in modes.values() for graph in blocks]
        for split in self._segments.values():
            graphs += [part for blocks in split.values() for parts in blocks for part in parts]
        return [*self.analysed.values(), *(graph.module for graph in graphs)]

    def headless(self) -> Modes:
        """Return the blocks without their heads, for schedules that propagate gradients between blocks."""
        if self._headless is None:
            self._headless = {
                mode: [without_head(block.graph(mode)) for block in self._blocks] for mode in (True, False)
            }
        return self._headless

    def with_layers(self) -> Modes:
        """Return the blocks with the outputs of their base layers among the exports, for losses that read them."""
        if self._layers is None:
            self._layers = {}
            for mode in (True, False):
                shown = [show_layers(block.graph(mode), self._layers_of(mode)) for block in self._blocks]
                self._layers[mode] = [graph for graph, _ in shown]
                self._layer_names[mode] = [names for _, names in shown]
        return self._layers

    def layer_names(self, block: int, training: bool) -> tuple[str, ...]:
        """Return the names that the outputs of a block's base layers have among the exports of :meth:`with_layers`."""
        self.with_layers()
        return self._layer_names[training][block]

    def base_layers(self) -> list[list[str]]:
        """Return for each block the names of the cut points that end its base layers, in order.

        The end of a block counts as the end of a base layer, even where it is none. The end of the last block, which is
        the model's output, is ``""``.
        """
        chosen = {str(info(resolve(self.analysed[True].graph)[cut]).cut) for cut in self._cuts}
        blocks: list[list[str]] = [[]]
        layers = set(self._layers_of(True))
        for name in (str(info(node).cut) for node in cut_points(self.analysed[True].graph)):
            if name in chosen or name in layers:
                blocks[-1].append(name)
            if name in chosen:
                blocks.append([])
        blocks[-1].append("")
        return blocks

    def segments(self, reach: int, *, shown: bool = False) -> dict[bool, list[list[BlockGraph]]]:
        """Return the blocks in parts: each block but the last is split before its last `reach` base layers.

        Args:
            reach: number of base layers in the second part.
            shown: whether the outputs of base layers are among the exports, as in :meth:`with_layers`.

        Returns:
            Mode -> for each block its parts, two graphs. A block of exactly `reach` base layers has a single part, and
            so has the last block.

        Raises:
            ScheduleError: a block other than the last has fewer base layers than `reach`.
        """
        if (reach, shown) not in self._segments:
            starts = []
            for index, layers in enumerate(self.base_layers()[:-1]):
                if reach > len(layers):
                    shortest = min(map(len, self.base_layers()[:-1]))
                    raise ScheduleError(
                        f"reach={reach} is longer than block {index}, which has {len(layers)} base layer"
                        f"{'s' if len(layers) > 1 else ''} and ends behind {layers[-1]!r}: a link does not reach past "
                        f"the block below. Take reach={shortest} or less, or fewer blocks."
                    )
                starts.append(layers[-reach - 1] if reach < len(layers) else None)
            split = {mode: self._split(mode, starts) for mode in (True, False)}
            if shown:
                split = {
                    mode: [[show_layers(part, self._layers_of(mode))[0] for part in parts] for parts in blocks]
                    for mode, blocks in split.items()
                }
            self._segments[reach, shown] = split
        return self._segments[reach, shown]

    def _layers_of(self, training: bool) -> list[str]:
        return passes.base_layers(self.analysed[training])

    def _split(self, mode: bool, starts: Sequence[str | None]) -> list[list[BlockGraph]]:
        """Lower and partition the graph again with additional cuts; heads stay at the ends of the blocks.

        Args:
            mode: True for train.
            starts: for each block but the last the cut point before its second part, or None for a single part.
        """
        gm, heads, devices = self.analysed[mode], dict[str, list[nn.Module]](), list[torch.device]()
        for block, cut, start in itertools.zip_longest(self._blocks, self._cuts, starts):
            if start is not None:
                heads[start] = []
                devices.append(block.device)
            if cut is not None:
                heads[str(info(resolve(gm.graph)[cut]).cut)] = [block.head] if block.head is not None else []
            devices.append(block.device)
        spread = len(set(devices)) > 1
        lowered = passes.lower_at(gm, heads, devices if spread else None)
        pieces = iter(passes.partition(lowered))
        blocks = [[next(pieces) for _ in range(2 if start is not None else 1)] for start in [*starts, None]]
        for index, parts in enumerate(blocks):
            for node in (node for part in parts for node in part.module.graph.nodes):
                info(node).block = index
        graphs = [part.module for parts in blocks for part in parts]
        redirect(graphs, [block.device for block in self._blocks], self.traced_on)
        return blocks
