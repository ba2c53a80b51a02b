"""The interface of a search: the problem it is given, the decision it returns, and the base class it extends.

To write a search, subclass :class:`Search` and implement ``decide(problem)``: choose K - 1 of ``problem.places()``, in
order, and one of ``problem.candidates`` for each, and return ``problem.decision(...)``. ``CONTRIBUTING.md`` has an
example that runs. What a search may use:

- **The net**: the graphs ``problem.train`` and ``problem.eval``. They hold the net's own parameters and buffers, so a
  search that trains has to train copies.
- **Costs**: :mod:`sedona_fx.search.problem.plan_costs` says what plans cost, which of them keep within
  ``problem.limits``, and which are the best of these by additive scores, all of the example batch.
- **Data and loss**, if the class sets ``needs_data = True``: ``problem.data`` and :func:`local_loss_of`.
  :mod:`sedona_fx.search.session.data` turns the data into batches on the net's device.
- **Randomness**: generators of its own, seeded with ``problem.seed``, so that the same call gives the same plan.

``decouple`` calls ``decide`` only if some plan keeps within the limits, and raises an error if the decision does not.
"""

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
from sedona_fx.ir.stretches.shares import Measure
from sedona_fx.passes.cuts import resolve
from sedona_fx.passes.places import marked_places
from sedona_fx.search.problem.limits import Limits
from sedona_fx.search.problem.shortage import shortage

Choice = tuple[tuple[str, int], ...]
"""A plan by names: for each cut, in order, its place and the index of its head among the place's candidates."""

Positions = tuple[tuple[int, int], ...]
"""A plan by numbers: for each cut, in order, the index of its place in ``problem.places()`` and of its head."""


@dataclass(frozen=True)
class SearchData:
    """The data of a search.

    `train` and `val` are functions: each call starts an epoch and returns an iterator over its batches, pairs of
    (:class:`~sedona_fx.data.args.Args`, target). The arguments hold every input by its name, in ``args.kwargs``.
    Tensors are on the device that the user's data has them on.

    Attributes:
        train: batches to train weights on.
        val: batches to judge plans by; they have no example in common with `train`.
        epoch_batches: number of training batches in an epoch, or None if the data does not tell.
    """

    train: Source
    val: Source
    epoch_batches: int | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A net to cut, with everything that a search may read to decide how.

    Attributes:
        analysed: the graphs of the net, what heads must fit at each cut point, and how the loss reads outputs.
        blocks: K, the number of blocks to cut into, at least 1.
        candidates: legal cut point -> the heads to choose from there, for every cut point that a head fits, in the
            order of the forward pass. With ``heads=False`` the lists are empty.
        loss: ``loss(output, target)``, a scalar, of the model's output; None if the search does not need it.
        data: None if the search does not need it.
        limits: the most that the plan may cost; None: no limits.
        seconds: measured seconds of stretches and heads, in the form of ``plan.block_seconds``. Empty until a cost in
            seconds is asked for; :class:`~sedona_fx.search.problem.plan_costs.PlanCosts` fills it in.
        seed: of everything that the search draws.
        progress: whether to show progress bars.
        remedy: says, given how many places there are, what would help where they are too few; None: nothing is said.
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
    remedy: Callable[[int], str] | None = field(default=None, repr=False, compare=False)
    derived: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """A cache for what was computed from this problem, each entry under a key of its own. A copy that
    ``dataclasses.replace`` makes starts with an empty one."""

    @property
    def train(self) -> fx.GraphModule:
        """The ANALYSED graph of the net in train mode, with the net's own parameters."""
        return self.analysed.train

    @property
    def eval(self) -> fx.GraphModule:
        """The ANALYSED graph of the net in eval mode, with the net's own parameters."""
        return self.analysed.eval

    @property
    def contexts(self) -> Mapping[str, HeadContext]:
        """Legal cut point -> what a head must fit there: shapes of its input and its output."""
        return self.analysed.contexts

    @property
    def device(self) -> torch.device:
        """The device of the net's first parameter."""
        return next(self.train.parameters()).device

    def require_data(self, who: str) -> SearchData:
        """Return the data.

        Args:
            who: name of the search, for the message: ``"search='guided'"``.

        Raises:
            DataError: there is no data.
        """
        if self.data is None:
            raise DataError(f"{who} needs data to search on.")
        return self.data

    def places(self) -> list[str]:
        """Return the names of the cut points to choose from, in the order of the forward pass.

        These are the ends of the base layers and, if those are too few for K blocks, as few other legal cut points as
        make enough. None leaves a block without parameters to train.

        Raises:
            CutError: there are fewer than K - 1 such places.
        """
        names = self._places
        if self.blocks - 1 > len(names):
            more = self.remedy(len(names)) if self.remedy is not None else ""
            raise CutError(f"{shortage(self.train, self.blocks, self.contexts, self.candidates, len(names))}{more}")
        return list(names)

    def node(self, name: str) -> fx.Node:
        """Return the node of the train graph after which a cut point stands."""
        return self._nodes[name]

    def position(self, name: str) -> int:
        """Return the index of a place in :meth:`places`."""
        return self._positions[name]

    def require_heads(self, who: str) -> None:
        """Check that there are heads to choose from at every place.

        Args:
            who: name of the search, for the message: ``"search='guided'"``.

        Raises:
            CutError: there are none (``heads=False``).
        """
        if not all(self.candidates[place] for place in self.places()):
            raise CutError(
                f"{who} compares plans by the local losses of their heads and cannot run with heads=False: leave that "
                "out, or choose cuts by rule (search='balanced') or by name (cuts=[...])."
            )

    def decision(self, choice: Sequence[tuple[str, int]], provenance: Mapping[str, Any]) -> Decision:
        """Return a plan as a decision.

        Args:
            choice: for each cut, in order, its place and the index of its head in ``candidates[place]``. If that list
                is empty the cut has no head, whatever the index.
            provenance: how it was decided, as JSON values.
        """
        heads = [self.candidates[cut][index] if self.candidates[cut] else None for cut, index in choice]
        return Decision([cut for cut, _ in choice], heads, dict(provenance))

    def choice(self, decision: Decision) -> Choice:
        """Return the choice that :meth:`decision` makes this decision of.

        Raises:
            CutError: a cut has no head, or one that is not among its candidates.
        """
        pairs = []
        for cut, head in zip(decision.cuts, decision.heads, strict=True):
            specs = self.candidates[cut]
            if head is None or head not in specs:
                named = "no head" if head is None else f"the head {head_name(head)!r}"
                known = [head_name(spec) for spec in specs]
                raise CutError(
                    f"the search puts {named} behind {cut!r}, where the candidates are {known}. A search decides among "
                    "problem.candidates: hand what else there is in heads=[...]."
                )
            pairs.append((cut, specs.index(head)))
        return tuple(pairs)

    def identity(self) -> dict[str, Any]:
        """Return, as JSON values, what a decision depends on except for the weights and the data.

        A search that writes its state to a folder stores this beside it, and goes on only from the state of the same
        problem.
        """
        return {
            "seed": self.seed,
            "blocks": self.blocks,
            "limits": self.limits.given() if self.limits is not None else {},
            "candidates": {p: [head_name(spec) for spec in self.candidates[p]] for p in self.places()},
            "shapes": {name: list(p.shape) for name, p in self.train.named_parameters()},
        }

    @functools.cached_property
    def _places(self) -> list[str]:
        return marked_places(self.train, self.candidates, self.blocks - 1)

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.places())}

    @functools.cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return resolve(self.train.graph)


@dataclass(frozen=True)
class Decision:
    """What a search decided. :meth:`Problem.decision` makes one.

    Attributes:
        cuts: names of the K - 1 cut points, in order.
        heads: the head of each cut; None: no head.
        provenance: how it was decided, as JSON values. It is kept in the plan for people to read.
        block_seconds: the measured seconds that the decision is based on, in the form of ``plan.block_seconds``; None:
            none. ``decouple`` fills it in if there is a limit in seconds.
    """

    cuts: list[str]
    heads: list[HeadSpec | None]
    provenance: dict[str, Any] = field(default_factory=dict)
    block_seconds: dict[str, Any] | None = None


class Search(ABC):
    """A way to choose cuts and heads: subclass it, and pass an instance to ``decouple(search=...)``.

    A subclass states what it needs by overriding `needs_data`, `balances`, `val_batch_size` and `folder`, as class
    attributes or dataclass fields.
    """

    needs_data: ClassVar[bool] = False
    """Whether the search reads batches (``problem.data``) and the loss, or decides by the graphs alone."""

    @property
    def balances(self) -> Measure:
        """What blocks should share evenly, where ``decouple`` chooses how many activations may cross at a cut."""
        return "flops"

    @property
    def val_batch_size(self) -> int | None:
        """Number of examples in a validation batch, where ``decouple`` forms these; None: as many as in training."""
        return None

    @property
    def folder(self) -> str | Path | None:
        """Folder where the search saves its state, so that it can be resumed after it was killed; None: not saved."""
        return None

    @abstractmethod
    def decide(self, problem: Problem) -> Decision:
        """Choose K - 1 cuts among ``problem.places()``, in order, and a head for each among ``problem.candidates``."""


def local_loss_of(problem: Problem) -> Callable[[bool, Any, Any], Tensor]:
    """Return the function ``local_loss(is_last, output, target)`` that gives the scalar loss of a block.

    Its arguments are whether the block is the last one, the output of its head (of the last block: the net's own
    output), and the target of the batch. The problem needs a loss: the search's class has to set ``needs_data``.
    """
    loss, output_format = problem.loss, problem.analysed.output
    assert loss is not None

    def local_loss(is_last: bool, output: Any, target: Any) -> Tensor:
        if is_last:
            return output_format.final_loss(loss, output, target)
        return output_format.head_loss(loss, output, target)

    return local_loss


def candidate_cost(problem: Problem, cut: str, node: fx.Node, index: int = 0) -> Cost:
    """Return the cost of a candidate head, for the example batch: FLOPs of the forward pass, parameters, bytes saved.

    Args:
        problem: the net and its candidates.
        cut: a cut point.
        node: the node of the cut point, ``problem.node(cut)``.
        index: of the head in ``problem.candidates[cut]``. If that list is empty, the cost is zero.
    """
    specs = problem.candidates[cut]
    return cost_of_head(problem.analysed.head_costs, specs[index], problem.contexts[cut], node) if specs else Cost()
