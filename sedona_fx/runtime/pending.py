"""A block between its forward pass and its backward pass: what it exports can be handed on already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sedona_fx.runtime.block import Block
from sedona_fx.runtime.guard import Snapshot
from sedona_fx.runtime.run import Values


@dataclass(slots=True, kw_only=True)
class Pending:
    """A block whose forward pass is done, and whose backward pass is not.

    Attributes:
        block: the block.
        step: number of the training step.
        total: what the backward pass starts from, with its graph; None when it is done.
        loss: the local loss, detached.
        exports: what later blocks read, by name, detached: it can be handed on before the backward pass.
        local: the local output, detached.
        snapshot: restores the block's buffers.
        independent: as for :meth:`Engine.forward`.
    """

    block: Block
    step: int
    total: Tensor | None
    loss: Tensor
    exports: Values
    local: Any
    snapshot: Snapshot
    independent: bool
