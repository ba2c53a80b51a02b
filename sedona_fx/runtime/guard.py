"""Protect a block from a loss or a gradient that is not finite: it keeps its parameters, optimizer state and buffers.

On the CPU the loss is checked before the backward pass, which costs nothing, and the gradients before the optimizer
steps. On an accelerator these checks would make the host wait for the device at every block, so there they are
deferred: the verdict stays on the device, buffers are restored by ``torch.where``, the optimizer step is skipped by the
optimizer's own ``found_inf`` flag, and the error is raised once the verdict has arrived on the host anyway: at the next
step at the latest.

Optimizers without ``found_inf`` (all but the fused ones), and every optimizer at its first step, make the host wait for
the backward pass of their block.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.late_buffers import overwrite
from sedona_fx.errors import NonFiniteGradientError, NonFiniteLossError
from sedona_fx.runtime.gradients import gradients_of, not_finite, where_not_finite


class Snapshot:
    """Copies of buffers, taken before a forward pass.

    Args:
        buffers: the buffers to copy, and to restore later.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._pairs = [(b, b.detach().clone() if b.requires_grad else b.clone()) for b in buffers]

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.restore()

    def part(self, buffers: Sequence[Tensor]) -> Snapshot:
        """Return the snapshot of some of the buffers; it shares the copies."""
        wanted, part = {id(buffer) for buffer in buffers}, Snapshot([])
        part._pairs = [(buffer, old) for buffer, old in self._pairs if id(buffer) in wanted]
        return part

    def restore(self, unless: Tensor | None = None) -> None:
        """Write the copies back into the buffers.

        Args:
            unless: a boolean scalar tensor; where it is true the buffers keep their present values. It is not read on
                the host, so the host does not wait for it. None: always restore.
        """
        with torch.no_grad():
            for buffer, old in self._pairs:
                if unless is None:
                    overwrite(buffer, old)
                elif buffer.shape != old.shape:  # its first forward pass gave it a size: here the host waits, once
                    overwrite(buffer, buffer if unless.item() else old)
                else:
                    torch.where(unless.to(buffer.device), buffer, old, out=buffer)


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
        self._value = _Arriving(loss)

    def value(self) -> float:
        """Return the loss; the host waits until the device has computed it."""
        return self._value.item()

    def good(self) -> bool:
        """Return whether the loss is finite; the host waits until the device has computed it."""
        return math.isfinite(self.value())

    def error(self, blocks: Sequence[int]) -> NonFiniteLossError:
        """Return the error that says so, if it is not; with the indices of all blocks that failed."""
        return NonFiniteLossError(self.block, self.step, self.value(), blocks=blocks)


class GradientVerdict:
    """Whether a block's gradients are finite: known on the device at once, on the host when the copy has arrived.

    Args:
        block: index of the block.
        step: number of the training step.
        found: a scalar, above 0 where a number is not finite.

    Attributes:
        finite: a boolean scalar on the gradients' device.
    """

    def __init__(self, block: int, step: int, found: Tensor) -> None:
        self.block, self.step, self.finite = block, step, found == 0
        self._found = _Arriving(found)

    def good(self) -> bool:
        """Return whether the gradients are finite; the host waits until the device has computed them."""
        return not self._found.item()

    def error(self, blocks: Sequence[int]) -> NonFiniteLossError:
        """Return the error that says so, if they are not; with the indices of all blocks that failed."""
        return NonFiniteGradientError(self.block, self.step, blocks=blocks)


class _Arriving:
    """A scalar on its way to the host."""

    def __init__(self, scalar: Tensor) -> None:
        self._value = scalar.to("cpu", non_blocking=True)
        self._arrived: torch.Event | None = None
        if scalar.device.type != "cpu":
            self._arrived = torch.Event(scalar.device)
            self._arrived.record(torch.accelerator.current_stream(scalar.device))

    def item(self) -> float:
        """Return the number; the host waits until the device has computed it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value.item()


class Gradients(NamedTuple):
    """The gradients of a block that are to be checked, in the parameters' ``.grad``.

    Attributes:
        block: index of the block.
        parameters: the block's trained parameters.
        overflow: scalars above 0 where a gradient scaler has found the gradients to be infinite: it skips the step and
            lowers its scale, which is no error. Empty without a scaler.
    """

    block: int
    parameters: Sequence[nn.Parameter]
    overflow: Sequence[Tensor] = ()

    def bad(self) -> bool:
        """Return whether a gradient is not finite, and no scaler skips the step for it; the host waits."""
        gradients = gradients_of(self.parameters)
        return bool(gradients and not_finite(gradients).item() and not any(flag.item() for flag in self.overflow))


Names = Callable[[], Mapping[nn.Parameter, str]]
"""Returns the names of the parameters, for an error; called only then."""


class FiniteGuard:
    """Checks losses and gradients of all blocks, step after step, and keeps deferred verdicts until they are raised.

    Args:
        deferred: whether verdicts may stay on the device until the next step. None: only where what is checked is not
            on the CPU.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.deferred = deferred
        self._pending: list[Verdict | GradientVerdict] = []
        self._kept: dict[int, Snapshot] = {}  # by block, until its gradients are checked
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def protecting(self, buffers: Sequence[Tensor]) -> Snapshot:
        """Restore buffers to their values from before if the body raises; gives the snapshot that does it."""
        return Snapshot(buffers)

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
        if defer and self._defers(loss):
            self._pending.append(Verdict(block, step, loss.detach()))
        elif not math.isfinite(value := loss.item()):
            raise NonFiniteLossError(block, step, value, blocks=[block])

    def check_gradients(self, blocks: Sequence[Gradients], step: int, names: Names, *, defer: bool = True) -> None:
        """Check gradients that are complete, before an optimizer steps with them.

        If any are not finite, the buffers of these blocks are restored, as far as snapshots of them are kept.

        Args:
            blocks: the blocks, and the parameters of each; a parameter may be without a gradient.
            step: number of the training step, for the error.
            names: gives the names of the parameters, for the error.
            defer: whether the verdicts may be deferred, where the guard defers any.

        Raises:
            NonFiniteGradientError: gradients are not finite; it names the last such block. If the verdicts are
                deferred, :meth:`raise_pending` raises it.
        """
        gradients = [gradient for _, parameters, _ in blocks for gradient in gradients_of(parameters)]
        snapshots = [self._kept.pop(block) for block, _, _ in blocks if block in self._kept]
        if not gradients:
            return
        if defer and self._defers(gradients[0]):
            self._defer_gradients(blocks, step, dict.fromkeys(snapshots))
        elif not_finite(gradients).item() and (bad := [each for each in blocks if each.bad()]):
            for snapshot in snapshots:
                snapshot.restore()
            known, last = names(), bad[-1]
            place = where_not_finite((known.get(p, "a parameter of an extra loss"), p) for p in last.parameters)
            raise NonFiniteGradientError(last.block, step, *place, blocks=[each.block for each in bad])

    def _defer_gradients(self, blocks: Sequence[Gradients], step: int, snapshots: Iterable[Snapshot]) -> None:
        """Leave the verdicts on the device, and let them decide what becomes of the buffers."""
        verdicts = []
        for block, parameters, overflow in blocks:
            if gradients := gradients_of(parameters):
                found = not_finite(gradients)
                for flag in overflow:
                    found = torch.where(flag.to(found.device) > 0, 0.0, found)
                verdicts.append(GradientVerdict(block, step, found))
        finite = torch.stack([verdict.finite.to(verdicts[0].finite.device) for verdict in verdicts]).all()
        for snapshot in snapshots:
            snapshot.restore(unless=finite)
        self._pending += reversed(verdicts)

    def keep(self, snapshot: Snapshot, blocks: Iterable[int]) -> None:
        """Keep a snapshot until the gradients of these blocks are checked, or :meth:`release` is called."""
        self._kept.update(dict.fromkeys(blocks, snapshot))

    def release(self) -> None:
        """Drop the snapshots that are kept."""
        self._kept.clear()

    def _defers(self, scalar: Tensor) -> bool:
        return scalar.device.type != "cpu" if self.deferred is None else self.deferred

    def settle(self, block: int, snapshot: Snapshot) -> None:
        """Restore a block's buffers if a deferred verdict on its loss is bad; the host does not wait.

        Call it after the block's backward pass: BatchNorm's backward saves the running statistics, and raises if they
        were written to in between.
        """
        for verdict in self._pending:
            if verdict.block == block and isinstance(verdict, Verdict):
                snapshot.restore(unless=verdict.finite)

    def step_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Collection[int],
        gradients: Collection[int],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Step an optimizer, unless a loss that contributed to its gradients, or one of these, is not finite.

        Args:
            optimizer: the optimizer to step.
            losses: indices of the blocks whose losses contributed to the gradients of the optimizer's parameters.
            gradients: indices of the blocks whose gradients, checked by :meth:`check_gradients`, decide.
            scaler: the gradient scaler, which also skips the step by itself if gradients are not finite; or None.
        """
        verdicts = [v for v in self._pending if v.block in (losses if isinstance(v, Verdict) else gradients)]
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        # A fused optimizer that skips its very first step is left with state that was never written (SGD's momentum).
        if verdicts and fused and scaler is None and optimizer in self._stepped:
            bad = torch.stack([~verdict.finite.to(verdicts[0].finite.device) for verdict in verdicts]).any()
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
        elif all(verdict.good() for verdict in verdicts):
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.step()
            self._stepped.add(optimizer)

    def raise_pending(self) -> None:
        """Check all deferred verdicts; the host waits for the losses and gradients.

        Raises:
            NonFiniteLossError: a loss was not finite; the error names the first such block, and lists all of them.
            NonFiniteGradientError: no loss before it, but a gradient was not finite.
        """
        pending, self._pending = self._pending, []
        bad = [verdict for verdict in pending if not verdict.good()]
        if bad:
            raise bad[0].error(list(dict.fromkeys(verdict.block for verdict in bad)))

    def __deepcopy__(self, memo: dict[int, object]) -> FiniteGuard:
        return FiniteGuard(self.deferred)  # pending verdicts are raised by the original
