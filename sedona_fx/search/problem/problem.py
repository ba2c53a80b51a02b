"""What a search is given, and what it gives back."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sedona_fx.data.sources import Source
from sedona_fx.errors import CutError, DataError
from sedona_fx.heads.context import HeadContext, HeadSpec
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.cost import Cost, cost_of_head
from sedona_fx.ir.outputs import Loss
from sedona_fx.passes.cuts import base_layers, resolve
from sedona_fx.search.problem.limits import Limits


@dataclass(frozen=True)
class SearchData:
    """The data of a search. A source gives one epoch per call, every input by its argument name.

    Attributes:
        train: batches for the weights.
        val: batches for the decision; they have no example in common with `train`.
        epoch_batches: number of training batches in an epoch, or None where the data does not tell.
    """

    train: Source
    val: Source
    epoch_batches: int | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A net to cut.

    Attributes:
        analysed: the graphs, what heads have to fit, and what the loss is about.
        blocks: K, the number of blocks wanted.
        candidates: heads to choose from, for every legal cut point that a head fits at; an empty list: no heads.
        loss: of the model's output; None where no search needs it.
        data: None where one batch is all there is.
        limits: what the plan may cost; None: anything.
        seconds: of stretches and heads, as they were measured.
        seed: of everything that the search draws.
        progress: whether to show progress bars.
    """

    analysed: Analysed
    blocks: int
    candidates: Mapping[str, Sequence[HeadSpec]]
    loss: Loss | None = None
    data: SearchData | None = None
    limits: Limits | None = None
    seconds: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    seed: int = 0
    progress: bool = False
    derived: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What others have worked out about this problem, each under a name of its own; empty in a changed copy."""

    @property
    def train(self) -> fx.GraphModule:
        """The ANALYSED train graph."""
        return self.analysed.train

    @property
    def eval(self) -> fx.GraphModule:
        """The ANALYSED eval graph."""
        return self.analysed.eval

    @property
    def contexts(self) -> Mapping[str, HeadContext]:
        """What a head has to fit, for every legal cut point."""
        return self.analysed.contexts

    @property
    def device(self) -> torch.device:
        """Where the net lives: the device of its first parameter."""
        return next(self.train.parameters()).device

    def require_data(self, who: str) -> SearchData:
        """Return the data.

        Args:
            who: needs it, for the message: ``"search='guided'"``.

        Raises:
            DataError: there is none.
        """
        if self.data is None:
            raise DataError(f"{who} needs data to search on.")
        return self.data

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

    def position(self, name: str) -> int:
        """Return the number of a place among those to choose from."""
        return self._positions[name]

    def require_heads(self, who: str) -> None:
        """See that there are heads to choose from at every place.

        Args:
            who: chooses, for the message: ``"search='guided'"``.

        Raises:
            CutError: there are none (``heads=False``).
        """
        if not all(self.candidates[place] for place in self.places()):
            raise CutError(
                f"{who} compares plans by the local losses of their heads and cannot run with heads=False: leave that "
                "out, or choose cuts by rule (search='balanced') or by name (cuts=[...])."
            )

    def decision(self, choice: Sequence[tuple[str, int]], provenance: Mapping[str, Any]) -> Decision:
        """Return a plan, given as its cuts, each with the number of its head among the candidates, as a decision.

        Where there are no candidates the cut has no head.
        """
        heads = [self.candidates[cut][k] if self.candidates[cut] else None for cut, k in choice]
        return Decision([cut for cut, _ in choice], heads, dict(provenance))

    def choice(self, decision: Decision) -> tuple[tuple[str, int], ...]:
        """Return what :meth:`decision` makes that decision of.

        Raises:
            CutError: a head is not among the candidates.
        """
        found = []
        for cut, head in zip(decision.cuts, decision.heads, strict=True):
            specs = self.candidates[cut]
            if head is None or head not in specs:
                named = "no head" if head is None else f"the head {head_name(head)!r}"
                known = [head_name(spec) for spec in specs]
                raise CutError(
                    f"the search puts {named} behind {cut!r}, where the candidates are {known}. A search decides among "
                    "problem.candidates: hand what else there is in heads=[...]."
                )
            found.append((cut, specs.index(head)))
        return tuple(found)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON, what tells this problem from another: all that a plan depends on but weights and data."""
        return {
            "seed": self.seed,
            "blocks": self.blocks,
            "limits": self.limits.given() if self.limits is not None else {},
            "candidates": {p: [head_name(spec) for spec in self.candidates[p]] for p in self.places()},
            "shapes": {name: list(p.shape) for name, p in self.train.named_parameters()},
        }

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.places())}

    @functools.cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return resolve(self.train.graph)


@dataclass(frozen=True)
class Decision:
    """What a search decided.

    Attributes:
        cuts: names of the K-1 cut points, in order.
        heads: the head of each cut; None: no head.
        provenance: how it was decided, as JSON, for people.
        block_seconds: the seconds of stretches and heads that were measured for it; None: none were.
    """

    cuts: list[str]
    heads: list[HeadSpec | None]
    provenance: dict[str, Any] = field(default_factory=dict)
    block_seconds: dict[str, Any] | None = None


class Search(ABC):
    """A way to choose cuts and heads: subclass it, and hand an instance to ``decouple(search=...)``.

    A search says in its class what it asks for: `needs_data`, and as attributes or fields of its own `val_batch_size`
    and `folder`.
    """

    needs_data: ClassVar[bool] = False
    """Whether it reads batches (``problem.data``) and the loss, or decides by the graphs alone."""

    @property
    def val_batch_size(self) -> int | None:
        """Examples in a validation batch, where ``decouple`` makes them; None: as many as in training."""
        return None

    @property
    def folder(self) -> str | Path | None:
        """Where the search writes down its state, to go on from there after it was killed; None: nowhere."""
        return None

    @abstractmethod
    def decide(self, problem: Problem) -> Decision:
        """Choose K-1 cuts among ``problem.places()`` and a head for each among ``problem.candidates``."""


def local_loss_of(problem: Problem) -> Callable[[bool, Any, Any], Tensor]:
    """Return ``local_loss(is last, local output, target)``: the loss on a head's output, or on the net's own."""
    loss, output = problem.loss, problem.analysed.output
    assert loss is not None

    def local_loss(last: bool, local: Any, target: Any) -> Tensor:
        return output.final_loss(loss, local, target) if last else output.head_loss(loss, local, target)

    return local_loss


def candidate_cost(problem: Problem, cut: str, node: fx.Node, index: int = 0) -> Cost:
    """Return the cost of a candidate head at a cut point (nothing without heads)."""
    specs = problem.candidates[cut]
    return cost_of_head(problem.analysed.head_costs, specs[index], problem.contexts[cut], node) if specs else Cost()


Choice = tuple[tuple[str, int], ...]
"""A plan: the places of its cuts in order, and for each the number of its head among the candidates."""


Positions = tuple[tuple[int, int], ...]
"""A plan: for each cut, the 0-based number of its place and of its head."""
