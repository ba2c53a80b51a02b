"""What analysis found out about a model: its ANALYSED graphs, its output, and what a head has to fit at each cut."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from sedona_fx.data.args import Args
from sedona_fx.heads.context import HeadContext
from sedona_fx.ir.cost import Cost
from sedona_fx.ir.outputs import OutputFormat
from sedona_fx.plan_values import Capture


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
        head_costs: what heads were found to cost so far; filled as costs are asked for.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: OutputFormat
    contexts: dict[str, HeadContext]
    example: Args
    few: Any
    whole: Any = None
    named: tuple[str, ...] = ()
    capture: Capture = field(default_factory=Capture)
    head_costs: dict[Hashable, Cost] = field(default_factory=dict, repr=False, compare=False)
