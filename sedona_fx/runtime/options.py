"""What the engine is called with: one batch, and how its local steps are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sedona_fx.data.sources import to_device
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.runtime.block import Block, buffers_of
from sedona_fx.runtime.run import Values


@dataclass(frozen=True)
class Batch:
    """One batch, as the blocks take it.

    Attributes:
        inputs: the net's inputs by argument name.
        target: handed to the loss.
        step: number of the training step; with the seed and the block it decides the random draws.
        training: whether the train graphs or the eval graphs run.
    """

    inputs: Mapping[str, Any]
    target: Any
    step: int
    training: bool = True
    _there: dict[torch.device, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def target_on(self, device: torch.device) -> Any:
        """Return the target on a device; it is moved there once, however many blocks read it there."""
        if device not in self._there:
            self._there[device] = to_device(self.target, device)
        return self._there[device]


BlockLoss = Callable[[Block, Batch, Values, Values, Tensor], Tensor]
"""What a block's backward pass starts from: a scalar, computed from the block, the batch, the values that the block
reads, its exports (not detached) and its local loss."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How the engine does local steps.

    Attributes:
        weight: factor of the losses, for accumulation.
        scalers: one gradient scaler per block, or None.
        autocast: dtype for the forward pass and the loss; None: the caller's own autocast state.
        defer: whether the check of a loss may stay on the device, so that the host does not wait.
        block_loss: what the backward pass starts from; None: the local loss.
        graphs: one graph per block to run in the place of the block's own, for a `block_loss` that needs more exports.
        buffers_of: returns the buffers that a local step of given blocks may change, those of `block_loss` included.
        guard_gradients: check what a step leaves in ``.grad``, unless a scaler is there to skip it. False: the caller
            does so when the gradients are complete.
    """

    weight: float = 1.0
    scalers: Sequence[Any] | None = None
    autocast: torch.dtype | None = None
    defer: bool = False
    block_loss: BlockLoss | None = None
    graphs: Sequence[BlockGraph] | None = None
    buffers_of: Callable[..., list[Tensor]] = buffers_of
    guard_gradients: bool = True

    def scaler(self, block: Block) -> Any:
        """Return the scaler of a block's gradients, or None."""
        return self.scalers[block.index] if self.scalers is not None else None


DEFAULT_OPTIONS = StepOptions()
