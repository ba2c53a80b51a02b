"""Greedy: every block follows its own local loss."""

from __future__ import annotations

from typing import Any

from sedona_fx.runtime.block import StepResult
from sedona_fx.train.schedules.headed import Headed


class Greedy(Headed):
    """Decoupled Greedy Learning, synchronous (Belilovsky, Eickenberg, Oyallon 2020, Algorithm 1); SEDONA's training.

    For each batch, for each block in order: forward on the detached input, local loss through the head, backward inside
    the block, optimizer step; the activation handed on is the one from before the step. At most one block's graph is
    alive at a time. A parameter shared by several blocks gets the sum of their gradients, in the last one's step.

    Arguments are those of :class:`~sedona_fx.train.schedules.headed.Headed`.
    """

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train every block on one batch; return the local losses and the output, both from before the update."""
        net = self.net
        with self._window() as ends:
            batch = net.batch(inputs, target)
            if self.check == "async":
                result = net.engine.backward(batch, self.how(), self._step_block if ends else (lambda index: None))
            else:
                result = net.engine.backward(batch, self.how())
                for block in net.blocks if ends else ():
                    self._step_block(block.index)
            net.steps += 1
        return result
