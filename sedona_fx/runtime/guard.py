"""Protect a block from a loss that is not finite: it keeps its parameters, optimizer state and buffers.

On the CPU the loss is checked before the backward pass, which costs nothing. On an accelerator that check would make
the host wait for the device at every block, so there it is deferred: the verdict stays on the device, buffers are
restored by ``torch.where``, the optimizer step is skipped by the optimizer's own ``found_inf`` flag, and the error is
raised once the verdict has arrived on the host anyway: at the next step at the latest.

Optimizers without ``found_inf`` (all but the fused ones), and every optimizer at its first step, make the host wait for
the loss, but not for the backward pass that follows it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sedona_fx.errors import NonFiniteLossError


class Snapshot:
    """Copies of buffers, taken before a forward pass.

    Args:
        buffers: the buffers to copy, and to restore later.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._pairs = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self, unless: Tensor | None = None) -> None:
        """Write the copies back into the buffers.

        Args:
            unless: a boolean scalar tensor; where it is true the buffers keep their present values. It is not read on
                the host, so the host does not wait for it. None: always restore.
        """
        with torch.no_grad():
            for buffer, old in self._pairs:
                value = old if unless is None else torch.where(unless.to(buffer.device), buffer, old)
                buffer.copy_(value)


class Verdict:
    """Whether a block's loss is finite: known on the device at once, on the host when the copy has arrived.

    Args:
        block: index of the block.
        step: number of the training step.
        loss: the block's loss, a detached scalar.

    Attributes:
        finite: a boolean scalar on the loss's device.
    """

    def __init__(self, block: int, step: int, loss: Tensor) -> None:
        self.block, self.step = block, step
        self.finite = torch.isfinite(loss)
        self._value = loss.to("cpu", non_blocking=True)
        self._arrived: torch.Event | None = None
        if loss.device.type != "cpu":
            self._arrived = torch.Event(loss.device)
            self._arrived.record(torch.accelerator.current_stream(loss.device))

    def value(self) -> float:
        """Return the loss; the host waits until the device has computed it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()

    def raise_if_bad(self) -> None:
        """Check the loss; the host waits until the device has computed it.

        Raises:
            NonFiniteLossError: it is not finite.
        """
        value = self.value()
        if not math.isfinite(value):
            raise NonFiniteLossError(self.block, self.step, value)


class FiniteGuard:
    """Checks the losses of all blocks, step after step, and keeps deferred verdicts until they are raised.

    Args:
        deferred: whether verdicts may stay on the device until the next step. None: only where the loss is not on the
            CPU.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.deferred = deferred
        self._pending: list[Verdict] = []
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    @contextmanager
    def protecting(self, buffers: Sequence[Tensor]) -> Iterator[Snapshot]:
        """Restore buffers to their values from before if the body raises; gives the snapshot that does it."""
        snapshot = Snapshot(buffers)
        try:
            yield snapshot
        except Exception:
            snapshot.restore()
            raise

    def check(self, block: int, step: int, loss: Tensor, *, defer: bool = True) -> None:
        """Check a loss before its backward pass.

        Args:
            block: index of the block.
            step: number of the training step, for the error.
            loss: what the backward pass starts from, a scalar.
            defer: whether the verdict may be deferred, where the guard defers any.

        Raises:
            NonFiniteLossError: the loss is not finite. If the verdict is deferred, :meth:`raise_pending` raises it.
        """
        verdict = Verdict(block, step, loss.detach())
        deferred = loss.device.type != "cpu" if self.deferred is None else self.deferred
        if defer and deferred:
            self._pending.append(verdict)
        else:
            verdict.raise_if_bad()

    def settle(self, block: int, snapshot: Snapshot) -> None:
        """Restore a block's buffers if a deferred verdict on its loss is bad; the host does not wait.

        Call it after the block's backward pass: BatchNorm's backward saves the running statistics, and raises if they
        were written to in between.
        """
        for verdict in self._pending:
            if verdict.block == block:
                snapshot.restore(unless=verdict.finite)

    def step_optimizer(
        self, optimizer: torch.optim.Optimizer, blocks: Collection[int], scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Step an optimizer, unless a loss that contributed to its gradients is not finite.

        Args:
            optimizer: the optimizer to step.
            blocks: indices of the blocks whose losses contributed to the gradients of the optimizer's parameters.
            scaler: the gradient scaler, which also skips the step by itself if gradients are not finite; or None.
        """
        verdicts = [verdict for verdict in self._pending if verdict.block in blocks]
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # A fused optimizer that skips its very first step is left with state that was never written (SGD's momentum).
        if verdicts and fused and scaler is None and optimizer in self._stepped:
            bad = torch.stack([~verdict.finite.to(verdicts[0].finite.device) for verdict in verdicts]).any()
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif all(math.isfinite(verdict.value()) for verdict in verdicts):
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.step()
            self._stepped.add(optimizer)

    def raise_pending(self) -> None:
        """Check all deferred verdicts; the host waits for the losses.

        Raises:
            NonFiniteLossError: a loss was not finite; the error names the first such block, and lists all of them.
        """
        pending, self._pending = self._pending, []
        bad = [verdict for verdict in pending if not math.isfinite(verdict.value())]
        if bad:
            raise NonFiniteLossError(bad[0].block, bad[0].step, bad[0].value(), blocks=[v.block for v in bad])

    def __deepcopy__(self, memo: dict[int, object]) -> FiniteGuard:
        return FiniteGuard(self.deferred)  # pending verdicts are raised by the original
