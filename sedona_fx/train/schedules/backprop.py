"""Backprop: the baseline, on the same net."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sedona_fx.ir.outputs import map_tensors
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.precision import casting
from sedona_fx.train.schedules.base import Schedule


class Backprop(Schedule):
    """Ordinary backpropagation of the final loss through the whole net, bit for bit as plain PyTorch does it.

    Heads, if the net has any, neither run nor get gradients nor are stepped. Random numbers come from the global
    stream.
    """

    @property
    def draws_globally(self) -> bool:
        """Whether draws come from the global streams."""
        return True

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of the user's model in a block, without the head's."""
        return block.base_parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch; return the final loss, alone in the list, and the output."""
        net, engine, last = self.net, self.net.engine, self.net.blocks[-1]
        with self._window() as ends:
            engine.guard.raise_pending()
            with engine.guard.protecting(list(net.model.buffers())) as snapshot:
                with casting(last.device, self.autocast):
                    output = net.call(inputs)
                    loss = engine.local_loss(last, output, target)
                engine.guard.check(last.index, net.steps, loss)
                engine.walk_back(last, loss, self._scaler(last.index), self._weight)
                engine.guard.settle(last.index, snapshot)
            net.steps += 1
            for block in net.blocks if ends else ():
                self._update(block.index, {last.index})
        return StepResult([loss.detach()], map_tensors(Tensor.detach, output))

    def _one_scaler(self) -> bool:
        return True  # one loss, one scale
