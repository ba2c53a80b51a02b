"""What a search is given, and what it gives back."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import fx

from sedona_fx.cost import Cost, head_cost
from sedona_fx.data import Source
from sedona_fx.errors import CutError
from sedona_fx.graph import info
from sedona_fx.heads import HeadContext, HeadFactory, build_head
from sedona_fx.outputs import OutputFormat
from sedona_fx.passes.cuts import base_layers, resolve
from sedona_fx.train.engine import Loss

HeadSpec = str | HeadFactory


@dataclass(frozen=True)
class Problem:
    """A net to cut.

    Attributes:
        train, eval: ANALYSED graphs.
        blocks: K, the number of blocks wanted.
        contexts: what a head has to fit, for every legal cut point.
        candidates: heads to choose from, for every legal cut point that a head fits behind; empty: no heads at all.
        output, loss: what local losses are about.
        costs: of candidate heads, as they were found.
        data: (training epochs, validation epochs, training batches an epoch), or None where one batch is all there is.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    blocks: int
    contexts: Mapping[str, HeadContext]
    candidates: Mapping[str, Sequence[HeadSpec]]
    output: OutputFormat
    loss: Loss | None
    data: tuple[Source, Source, int | None] | None
    seed: int
    progress: bool
    costs: dict[Hashable, Cost] = field(default_factory=dict, repr=False, compare=False)

    def places(self) -> list[str]:
        """Return the cut points to choose from, in order: the base layers, or all legal ones if those are too few."""
        names = [name for name in base_layers(self.train) if name in self.candidates]
        if self.blocks - 1 > len(names):
            names = list(self.candidates)
        if self.blocks - 1 > len(names):
            raise CutError(
                f"{self.blocks} blocks need {self.blocks - 1} cuts; this model has {len(names)} legal cut "
                f"points, enough for {len(names) + 1} blocks."
            )
        return names

    def node(self, name: str) -> fx.Node:
        """Return the train graph's node of a cut point."""
        return self._nodes[name]

    @functools.cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return resolve(self.train.graph)


@dataclass(frozen=True)
class Decision:
    """The K-1 cuts in order, the head of each (None: no heads), and where the decision came from (JSON)."""

    cuts: list[str]
    heads: list[HeadSpec | None]
    provenance: dict[str, Any] = field(default_factory=dict)


class Search(Protocol):
    """A way to decide."""

    needs_data: ClassVar[bool]

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads."""
        ...


def first_heads(problem: Problem, cuts: Sequence[str]) -> list[HeadSpec | None]:
    """Return the first candidate of each cut, or None without heads."""
    return [problem.candidates[cut][0] if problem.candidates[cut] else None for cut in cuts]


def candidate_cost(problem: Problem, cut: str, node: fx.Node, index: int = 0) -> Cost:
    """Return the cost of a candidate head at a cut point (nothing without heads)."""
    specs = problem.candidates[cut]
    return cost_of_head(problem.costs, specs[index], problem.contexts[cut], node) if specs else Cost()


def cost_of_head(known: dict[Hashable, Cost], spec: HeadSpec, context: HeadContext, node: fx.Node) -> Cost:
    """Return the cost of a head on the value of a node, and note it: a deep net has many cut points of few shapes."""
    value = info(node).value
    key = (spec, value, replace(context, place=""))
    if key not in known:
        known[key] = head_cost(lambda: build_head(spec, context), value)
    return known[key]
