"""What analysis found out about a model: its ANALYSED graphs, its output, and what a head has to fit at each cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sedona_fx.data.args import Args
from sedona_fx.heads.context import HeadContext
from sedona_fx.ir.cost import Cost
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.stretches.shares import Shares
from sedona_fx.plan_values import Capture, ExportOptions


@dataclass(frozen=True, kw_only=True)
class Offered:
    """Where blocks may end at one number of crossing activations.

    Attributes:
        max_live: how many activations may cross.
        legal: names of the legal cut points, in the order of the program.
        layers: how many of them end base layers.
        places: names of those that a search chooses from for the number of blocks wanted; fewer if there are no more.
        rank: 0 if all of these end base layers, else how bad the worst of them is, from 1.
        shares: the work before each of them.
    """

    max_live: int
    legal: tuple[str, ...]
    layers: int
    places: tuple[str, ...]
    rank: int
    shares: Shares


class OfferedAtAll(Mapping[int, Offered]):
    """What is offered at each number of crossing activations, and at the one that was chosen."""

    chosen: Offered

    @abstractmethod
    def either(self, max_live: int) -> list[Offered]:
        """Return what is offered along the longest chain, and, if that is another, along the most even one."""


@dataclass(frozen=True, kw_only=True)
class Analysed:
    """A model's ANALYSED graphs and what was learned about them. Made by :func:`sedona_fx.compile.analyse.analyse`.

    Attributes:
        train, eval: the graphs of both modes; one object where the modes do not differ.
        mode_paths: modules that look at their own ``training`` flag in their Python code, with the value that the flag
            must keep in train mode and in eval mode.
        output: how the loss sees what the model returns.
        contexts: what a head has to fit, for every legal cut point.
        example: the batch that the graphs were made with; every input has its argument name.
        few: what the model returned in train mode for the first two examples.
        whole: the same in the shapes of the whole batch, its rows repeated; None if these shapes are not known.
        named: the user's cuts, each by the name of its cut point.
        capture: how the graphs were recorded.
        export: with which options, where they were captured by ``torch.export``.
        offered: what is offered at the chosen number of crossing activations, and at others.
        head_costs: what heads were found to cost so far; filled as costs are asked for.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: OutputFormat
    contexts: dict[str, HeadContext]
    example: Args
    few: Any
    offered: OfferedAtAll = field(repr=False, compare=False)
    whole: Any = None
    named: tuple[str, ...] = ()
    capture: Capture = field(default_factory=Capture)
    export: ExportOptions = field(default_factory=ExportOptions)
    head_costs: dict[Hashable, Cost] = field(default_factory=dict, repr=False, compare=False)
