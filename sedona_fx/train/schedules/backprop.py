"""Backprop: ordinary backpropagation through the whole net, as the baseline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sedona_fx.ir.outputs import map_tensors
from sedona_fx.rng import turn
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.precision import casting
from sedona_fx.train.schedules.base import Schedule


class Backprop(Schedule):
    """Ordinary backpropagation of the final loss through the whole net, bit for bit as plain PyTorch does it.

    Heads, if the net has any, do not run, get no gradients, and are not stepped. Random numbers come from the global
    streams.

    Args: those of :class:`~sedona_fx.train.schedules.base.Schedule`.
    """

    @property
    def draws_globally(self) -> bool:
        """Whether random draws come from the global streams: always."""
        return True

    @property
    def single_scaler(self) -> bool:
        """Whether all blocks share one gradient scaler: always, as there is one loss."""
        return True

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of the user's model in a block, without those of the head."""
        return block.base_parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch; return the final loss, alone in the list, and the output."""
        net, engine, last = self.net, self.net.engine, self.net.blocks[-1]
        with self.accumulation_window() as updates:
            engine.guard.raise_pending()
            with engine.guard.protecting(list(net.model.buffers())) as snapshot:
                with casting(last.device, self.autocast):
                    with turn():  # other threads may have seeded the global streams for a block of theirs
                        output = net.call(inputs, backprop=True)
                    loss = engine.local_loss(last, output, target)
                engine.guard.check(last.index, net.steps, loss)
                engine.loss_backward(last, loss, self.scaler(last.index), self.loss_weight)
                engine.guard.settle(last.index, snapshot)
            net.steps += 1
            if updates:
                engine.guard.keep(snapshot, range(len(net.blocks)))
                self.update_all(wait=False)
        return StepResult([loss.detach()], map_tensors(Tensor.detach, output))
