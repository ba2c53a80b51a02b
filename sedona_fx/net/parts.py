"""The record of everything that a net is built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from sedona_fx.heads.objective import LocalLoss
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.cost import Cost
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import Loss
from sedona_fx.plan import Plan


@dataclass(frozen=True, kw_only=True)
class NetParts:
    """What :class:`~sedona_fx.Net` is built from. Made by :func:`sedona_fx.compile.build.build`.

    Attributes:
        model: the module whose tensors all graphs read; the net owns it.
        analysed: the graphs before cutting, from which other variants of the blocks are made.
        lowered: mode (True: train) -> LOWERED graph; one object if the modes do not differ.
        blocks: mode -> the K block graphs.
        heads: the auxiliary head of each of the K-1 cuts, or None.
        costs: of the K blocks, heads included, for the example batch.
        uneven: why the largest block is large, and what would help; empty if it is not.
        plan: what was decided.
        loss: ``loss(output, target)``. None: schedules cannot train the net.
        objectives: for each of the first K-1 blocks the user's own objective, or None for the model's loss.
    """

    model: nn.Module
    analysed: Analysed
    lowered: Mapping[bool, fx.GraphModule]
    blocks: Mapping[bool, Sequence[BlockGraph]]
    heads: Sequence[nn.Module | None]
    costs: Sequence[Cost]
    uneven: str
    plan: Plan
    loss: Loss | None
    objectives: Sequence[LocalLoss | None]
