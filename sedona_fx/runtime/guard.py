"""A loss that is not finite must not harm: the failing block keeps its parameters, optimizer state and buffers.

On the CPU the loss is looked at before the backward pass, which costs nothing. On an accelerator that would make the
host wait for the device at every block, so there the verdict is deferred: it stays on the device, buffers are put back
by ``torch.where``, the optimizer step is skipped by the optimizer's own ``found_inf`` flag, and the error comes when
the verdict has arrived anyway: at the next step at the latest. Optimizers without ``found_inf`` (all but the fused
ones), and every optimizer at its first step, make the host wait for the loss, not for the backward pass behind it.
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
    """Copies of buffers from before a forward pass."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._pairs = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put the copies back, or where `unless` (a boolean scalar on a device) is true leave the buffers alone."""
        with torch.no_grad():
            for buffer, old in self._pairs:
                kept = old if unless is None else torch.where(unless.to(buffer.device), buffer, old)
                buffer.copy_(kept)


class Verdict:
    """Whether a block's loss at a step is finite: known on the device at once, on the host when it has arrived."""

    def __init__(self, block: int, step: int, loss: Tensor) -> None:
        self.block, self.step = block, step
        self.finite = torch.isfinite(loss)
        self._value = loss.to("cpu", non_blocking=True)
        self._arrived: torch.Event | None = None
        if loss.device.type != "cpu":
            self._arrived = torch.Event(loss.device)
            self._arrived.record(torch.accelerator.current_stream(loss.device))

    def value(self) -> float:
        """Return the loss; waits until the device has computed it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()

    def raise_if_bad(self) -> None:
        """Raise if the loss is not finite."""
        value = self.value()
        if not math.isfinite(value):
            raise NonFiniteLossError(self.block, self.step, value)


class FiniteGuard:
    """Watches the losses of one step after another.

    Args:
        deferred: whether verdicts stay on the device until the next step; None: where the loss is not on the CPU.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.deferred = deferred
        self._pending: list[Verdict] = []
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    @contextmanager
    def protecting(self, buffers: Sequence[Tensor]) -> Iterator[Snapshot]:
        """Give buffers their values from before back if the body raises."""
        snapshot = Snapshot(buffers)
        try:
            yield snapshot
        except Exception:
            snapshot.restore()
            raise

    def check(self, block: int, step: int, loss: Tensor, *, defer: bool = True) -> None:
        """Look at a loss before its backward pass.

        Raises:
            NonFiniteLossError: at once, unless the verdict is deferred: then :meth:`raise_pending` raises it.
        """
        verdict = Verdict(block, step, loss.detach())
        deferred = loss.device.type != "cpu" if self.deferred is None else self.deferred
        if defer and deferred:
            self._pending.append(verdict)
        else:
            verdict.raise_if_bad()

    def settle(self, block: int, snapshot: Snapshot) -> None:
        """After a block's backward pass: put its buffers back where a deferred verdict says so, without waiting.

        Not before it: BatchNorm's backward holds the running statistics and refuses those written to in between.
        """
        for verdict in self._pending:
            if verdict.block == block:
                snapshot.restore(unless=verdict.finite)

    def step_optimizer(
        self, optimizer: torch.optim.Optimizer, blocks: Collection[int], scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Step an optimizer unless the loss of one of `blocks`, those whose losses its parameters had a part in, is
        known not to be finite. A `scaler` has its own say about the gradients."""
        verdicts = [verdict for verdict in self._pending if verdict.block in blocks]
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # A fused optimizer that skips its very first step keeps state that was never written (SGD's momentum).
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
        """Raise for the first deferred verdict on a loss that was not finite; waits for the losses."""
        pending, self._pending = self._pending, []
        bad = [verdict for verdict in pending if not math.isfinite(verdict.value())]
        if bad:
            raise NonFiniteLossError(bad[0].block, bad[0].step, bad[0].value(), blocks=[v.block for v in bad])

    def __deepcopy__(self, memo: dict[int, object]) -> FiniteGuard:
        return FiniteGuard(self.deferred)  # what is pending is the original's to raise
