"""A loss that is not finite must not harm: the failing block keeps its parameters, optimizer state and buffers.

On the CPU the loss is looked at before the backward pass, which costs nothing. On an accelerator that would make the
host wait for the device at every block, so there the verdict stays on the device: buffers are put back by
``torch.where``, the optimizer step is skipped by the optimizer's own ``found_inf`` flag, and the error comes when the
verdict has arrived anyway: at the next step at the latest. Optimizers without ``found_inf`` (all but the fused ones)
make the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sedona_fx.errors import NonFiniteLossError


class FiniteGuard:
    """Watches the losses of one step after another."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, int, Tensor]] = []

    @staticmethod
    def remember(buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of a block's buffers, to be handed to :meth:`check` after the block's forward."""
        return [buffer.detach().clone() for buffer in buffers]

    def check(self, block: int, step: int, loss: Tensor, buffers: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Look at a loss; where it is not finite, the buffers get their values from before.

        Raises:
            NonFiniteLossError: at once if the loss is on the CPU; else :meth:`raise_pending` raises it later.
        """
        loss = loss.detach()
        if loss.device.type == "cpu":
            value = loss.item()
            if not math.isfinite(value):
                with torch.no_grad():
                    for buffer, old in zip(buffers, before, strict=True):
                        buffer.copy_(old)
                raise NonFiniteLossError(block, step, value)
            return
        finite = torch.isfinite(loss)
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(finite, buffer, old))
        self._pending.append((block, step, loss))

    def step_optimizer(self, optimizer: torch.optim.Optimizer, block: int) -> None:
        """Step an optimizer unless the block's loss at this step was not finite."""
        losses = [loss for index, _, loss in self._pending if index == block]
        if not losses:
            optimizer.step()
            return
        bad = torch.stack([~torch.isfinite(loss) for loss in losses]).any()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad.item():
            optimizer.step()

    def raise_pending(self) -> None:
        """Raise for the first loss of earlier steps that was not finite."""
        pending, self._pending = self._pending, []
        if pending:
            for (block, step, _), value in zip(pending, [loss.item() for *_, loss in pending], strict=True):
                if not math.isfinite(value):
                    raise NonFiniteLossError(block, step, value)
