"""Greedy: every block trains by its own local loss alone."""

from __future__ import annotations

from typing import Any

from sedona_fx.runtime.block import StepResult
from sedona_fx.train.schedules.headed import Headed


class Greedy(Headed):
    """Decoupled Greedy Learning, synchronous (Belilovsky, Eickenberg, Oyallon 2020, Algorithm 1); SEDONA's training.

    For each batch, for each block in order: forward on the detached input, local loss through the head, backward inside
    the block, optimizer step. The next block reads the activation from before the step. At most one block's graph is
    alive at a time. A parameter shared by several blocks gets the sum of their gradients, in the last one's step.

    Args: those of :class:`~sedona_fx.train.schedules.headed.Headed`.
    """

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train every block on one batch; return the local losses and the output, both from before the update."""
        net = self.net
        with self.accumulation_window() as updates:
            batch = net.batch(inputs, target)
            if self.check == "async":
                on_block = self.step_block if updates else _do_nothing
                result = net.engine.backward(batch, self.step_options(), on_block)
            else:
                result = net.engine.backward(batch, self.step_options())
                if updates:
                    self.update_all(wait=True)
                    self.zero_grad()
            net.steps += 1
        return result


def _do_nothing(index: int) -> None:
    """Stand for ``step_block`` inside a window: with a callback, the engine treats each block on its own."""
