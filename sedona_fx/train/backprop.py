"""Backprop: the baseline, on the same net."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.train.engine import Block, StepResult, no_autocast
from sedona_fx.train.schedule import Schedule


class Backprop(Schedule):
    """Ordinary backpropagation of the final loss through the whole net, bit for bit as plain PyTorch does it.

    Heads, if the net has any, neither run nor get gradients nor are stepped. Random numbers come from the global
    stream.
    """

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of the user's model in a block, without the head's."""
        return block.base_parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch; return the final loss, alone in the list, and the output."""
        for optimizer in self.optimizers:
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        engine, last = self.net.engine, self.net.blocks[-1]
        engine.guard.raise_pending()
        buffers = [buffer for block in engine.blocks for buffer in block.buffers()]
        before = engine.guard.remember(buffers)
        output = self.net.call(inputs)
        loss = engine.local_loss(last, output, target)
        engine.guard.check(last.index, self.net.steps, loss, buffers, before)
        self.net.steps += 1
        with no_autocast(last.device):
            loss.backward()
        for block, optimizer in zip(engine.blocks, self.optimizers, strict=True):
            if optimizer is not None:
                self._clip(block)
                engine.guard.step_optimizer(optimizer, last.index)
        return StepResult([loss.detach()], pytree.tree_map_only(Tensor, Tensor.detach, output))
