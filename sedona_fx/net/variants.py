"""The graphs of a net's blocks in the forms that schedules need, made when they are asked for."""

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


class Variants:
    """Other forms of a net's blocks. They share its modules; who replaces tensors shows them :meth:`graphs`.

    Args:
        analysed: the ANALYSED graphs, by mode.
        blocks: the net's.
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
        self.analysed, self._blocks, self._cuts, self.traced_on = dict(analysed), tuple(blocks), tuple(cuts), traced_on
        self._headless: Modes | None = None
        self._layers: Modes | None = None
        self._layer_names: dict[bool, list[tuple[str, ...]]] = {}
        self._segments: dict[tuple[int, bool], dict[bool, list[list[BlockGraph]]]] = {}

    def graphs(self) -> list[fx.GraphModule]:
        """Return every graph made so far, and those to make others from."""
        modes = [m for m in (self._headless, self._layers) if m is not None]
        made = [graph for mode in modes for graphs in mode.values() for graph in graphs]
        made += [g for modes in self._segments.values() for blocks in modes.values() for parts in blocks for g in parts]
        return [*self.analysed.values(), *(graph.module for graph in made)]

    def headless(self) -> Modes:
        """Return the blocks without their heads."""
        if self._headless is None:
            self._headless = {
                mode: [without_head(block.graph(mode)) for block in self._blocks] for mode in (True, False)
            }
        return self._headless

    def with_layers(self) -> Modes:
        """Return the blocks with the values behind their base layers among the exports."""
        if self._layers is None:
            self._layers = {}
            for mode in (True, False):
                made = [show_layers(block.graph(mode), self._layers_of(mode)) for block in self._blocks]
                self._layers[mode] = [graph for graph, _ in made]
                self._layer_names[mode] = [names for _, names in made]
        return self._layers

    def layer_names(self, block: int, training: bool) -> tuple[str, ...]:
        """Return the names of the values behind a block's base layers, among the exports of :meth:`with_layers`."""
        self.with_layers()
        return self._layer_names[training][block]

    def base_layers(self) -> list[list[str]]:
        """Return the ends of the base layers of each block, in order. A block's own end counts, whatever it is; that of
        the last block, the output, is ``""``."""
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
        """Return each block but the last as its body and its tail of `reach` base layers; as one, where that is all.

        With `shown`, the values behind base layers are among their exports, as in :meth:`with_layers`.

        Raises:
            ScheduleError: a block is shorter.
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
            made = {mode: self._split(mode, starts) for mode in (True, False)}
            if shown:
                made = {
                    mode: [[show_layers(part, self._layers_of(mode))[0] for part in parts] for parts in blocks]
                    for mode, blocks in made.items()
                }
            self._segments[reach, shown] = made
        return self._segments[reach, shown]

    def _layers_of(self, training: bool) -> list[str]:
        return passes.base_layers(self.analysed[training])

    def _split(self, mode: bool, starts: Sequence[str | None]) -> list[list[BlockGraph]]:
        """Lower and partition anew with a cut before each tail as well; heads stay where they were."""
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
