"""What a net is made of, in one record."""

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
    """Everything that :class:`~sedona_fx.Net` is made of.

    Attributes:
        model: the module whose tensors all graphs read; the net owns it.
        analysed: the graphs before cutting, from which schedules make other forms of the blocks.
        lowered: the LOWERED graph of each mode (True: train); one object where the modes do not differ.
        blocks: the K block graphs of each mode.
        heads: the auxiliary head of each of the K-1 cuts, or None.
        costs: of the K blocks, heads included.
        plan: what was decided.
        loss: ``loss(output, target)``; None: schedules cannot train.
        objectives: for each of the first K-1 blocks the user's own objective, or None for the model's loss.
    """

    model: nn.Module
    analysed: Analysed
    lowered: Mapping[bool, fx.GraphModule]
    blocks: Mapping[bool, Sequence[BlockGraph]]
    heads: Sequence[nn.Module | None]
    costs: Sequence[Cost]
    plan: Plan
    loss: Loss | None
    objectives: Sequence[LocalLoss | None]
