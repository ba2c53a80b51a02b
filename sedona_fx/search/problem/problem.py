"""What a search is given, and what it gives back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, fx

from sedona_fx.data.sources import Source
from sedona_fx.errors import CutError
from sedona_fx.heads.context import HeadContext, HeadSpec
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.cost import Cost, cost_of_head
from sedona_fx.ir.outputs import Loss, OutputFormat
from sedona_fx.passes.cuts import base_layers, resolve
from sedona_fx.search.problem.limits import Limits

if TYPE_CHECKING:
    from sedona_fx.search.problem.plan_costs import PlanCosts


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
        limits: what the plan may cost; None: anything.
        example: the first batch's inputs by name, to measure seconds on.
        seconds: of stretches and heads, as they were measured.
        free_batch: whether the graphs take batches of any size.
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
    limits: Limits | None = None
    example: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    seconds: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    free_batch: bool = True

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
    def plan_costs(self) -> PlanCosts:
        """What all plans over these places cost, and which keep within the limits."""
        from sedona_fx.search.problem.plan_costs import PlanCosts  # it is made of a problem

        return PlanCosts.of(self)

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.places())}

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


def local_loss_of(problem: Problem) -> Callable[[bool, Any, Any], Tensor]:
    """Return ``local_loss(is last, local output, target)``: the loss on a head's output, or on the net's own."""
    loss, output = problem.loss, problem.output
    assert loss is not None

    def local_loss(last: bool, local: Any, target: Any) -> Tensor:
        return output.final_loss(loss, local, target) if last else output.head_loss(loss, local, target)

    return local_loss


def candidate_cost(problem: Problem, cut: str, node: fx.Node, index: int = 0) -> Cost:
    """Return the cost of a candidate head at a cut point (nothing without heads)."""
    specs = problem.candidates[cut]
    return cost_of_head(problem.costs, specs[index], problem.contexts[cut], node) if specs else Cost()


Choice = tuple[tuple[str, int], ...]
"""A plan: the places of its cuts in order, and for each the number of its head among the candidates."""


Positions = tuple[tuple[int, int], ...]
"""A plan: for each cut, the 0-based number of its place and of its head."""
