"""Greedy: every block follows its own local loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sedona_fx.errors import ScheduleError
from sedona_fx.train.engine import StepResult
from sedona_fx.train.schedule import OptimizerFactory, Schedule

if TYPE_CHECKING:
    from sedona_fx.net import Net


class Greedy(Schedule):
    """Decoupled Greedy Learning, synchronous (Belilovsky, Eickenberg, Oyallon 2020, Algorithm 1); SEDONA's training.

    For each batch, for each block in order: forward on the detached input, local loss through the head, backward inside
    the block, optimizer step; the activation handed on is the one from before the step. At most one block's graph is
    alive at a time. A parameter shared by several blocks gets the sum of their gradients, in the last one's step.

    Args:
        net: a net with heads.
        optimizer: called once a block with that block's parameters, the head's included.
        clip: largest gradient norm of each block (L2), or None.
        check: ``"async"``: each block steps as soon as its gradients are there; a loss that is not finite leaves its
            own block unharmed and is reported at the latest one step later. ``"sync"``: no block steps before all K
            losses are known to be finite; else the BatchNorm buffers of all blocks are as before, too.
    """

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerFactory,
        *,
        clip: float | None = None,
        check: Literal["async", "sync"] = "async",
    ) -> None:
        net.engine.require_heads("Greedy")
        if check not in ("async", "sync"):
            raise ScheduleError(f"check={check!r} is neither 'async' nor 'sync'.")
        self.check = check
        super().__init__(net, optimizer, clip=clip)

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train every block on one batch; return the local losses and the output, both from before the update."""
        self._zero_grad()
        if self.check == "async":
            return self.net.run_blocks(inputs, target, on_block=self._step_block, defer=True)
        result = self.net.run_blocks(inputs, target)
        for block in self.net.blocks:
            self._step_block(block.index)
        return result

    def _step_block(self, index: int) -> None:
        self._update(index, self.contributors[index])
        self._zero_grad(index)  # gradients of a block need not outlive its step
