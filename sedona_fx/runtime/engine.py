"""The block engine: forward pass of a block, its local loss, its backward pass, free its graph, next block.

Every schedule is a small file on top of this one. The engine detaches the activations that enter a block, so that no
gradient leaves it towards the input (the block's graph itself detaches nothing); the gradient that enters a block from
later blocks is up to the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.data.sources import to_device
from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.ir.modules import runs_python
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.outputs import Loss, map_tensors, split_local
from sedona_fx.rng import block_random, turn
from sedona_fx.runtime.block import Block, StepResult, buffers_of, parameter_names
from sedona_fx.runtime.draws import may_draw
from sedona_fx.runtime.gradients import can_train, trained_in
from sedona_fx.runtime.guard import FiniteGuard, Gradients
from sedona_fx.runtime.options import DEFAULT_OPTIONS, Batch, StepOptions
from sedona_fx.runtime.pending import Pending
from sedona_fx.runtime.precision import casting, no_autocast
from sedona_fx.runtime.run import Values, detached, hand_on, last_readers, run_graph

OnBlock = Callable[[int], None]
"""Called with a block's index when its gradients are complete."""


class Engine:
    """Runs the blocks of one net.

    Args:
        blocks: the net's blocks, nearest the input first.
        output: where the primary output is in what the model returns.
        loss: the model's loss, ``loss(output, target)``; None: the net cannot be trained.
        seed: of the blocks' random draws.

    Attributes:
        guard: checks losses and gradients; it is shared by all schedules of the net.
        misfit: why the heads do not fit the model's output any more; empty while they do.
    """

    def __init__(self, blocks: Sequence[Block], output: OutputFormat, loss: Loss | None, seed: int) -> None:
        self.blocks, self.output, self.loss, self.seed = list(blocks), output, loss, seed
        self.guard, self.misfit = FiniteGuard(), ""
        self._runs_python = [runs_python(block.module) for block in self.blocks]
        self._version, self._draws = 0, dict[int, bool]()
        self._last_reader = {mode: last_readers([block.graph(mode)] for block in self.blocks) for mode in (True, False)}

    def local_losses(self, batch: Batch) -> list[Tensor]:
        """Return the local losses of all blocks with their graphs; no gradient flows between blocks.

        Raises:
            ScheduleError: a block has no head.
        """
        self.require_heads("net.losses")
        values, losses = dict(batch.inputs), []
        for block in self.blocks:
            with self.seeded(block, batch.step):
                exports, local = block(values, batch.training)
            losses.append(self.local_loss(block, local, batch.target_on(block.device), batch.inputs))
            self.hand_on(block, values, exports, batch.training)
        return losses

    def backward(
        self, batch: Batch, options: StepOptions = DEFAULT_OPTIONS, on_block: OnBlock | None = None
    ) -> StepResult:
        """Do a local step of every block, one after the other; gradients are added to ``.grad``.

        Without `on_block`, the step is all or nothing: if any loss or gradient is not finite, the buffers of all blocks
        are restored, and the host waits for the verdicts once, at the end. With `on_block`, each block is on its own:
        the host waits for each loss, or with ``options.defer`` not at all, and then `on_block` must step its optimizer
        through the guard.

        Args:
            batch: the batch.
            options: how the steps are done.
            on_block: called when a block's gradients are complete, before the next block runs. That block reads the
                activation from before any change that `on_block` makes to the parameters.

        Returns:
            The local losses (not weighted) and the output, detached.

        Raises:
            NonFiniteLossError: a loss or gradient is not finite, or one of the step before was not.
            ScheduleError: a block has no head, or gradients are disabled.
        """
        self.require_heads("net.backward")
        require_grad_mode("net.backward")
        self.guard.raise_pending()
        all_or_nothing = on_block is None
        values, losses, local = dict(batch.inputs), [], None
        with self.guard.protecting(options.buffers_of(*self.blocks)) if all_or_nothing else nullcontext() as snapshot:
            for block in self.blocks:
                pending = self.forward(block, batch, values, options, independent=not all_or_nothing)
                self.hand_on(block, values, pending.exports, batch.training)
                self.walk_back(pending, options)
                losses.append(pending.loss)
                local = pending.local
                if on_block is not None:
                    on_block(block.index)
            if snapshot is not None:
                checked = [g for block in self.blocks for g in self._gradients(block, options)]
                self.guard.raise_pending()
                self.guard.check_gradients(checked, batch.step, self.parameter_names, defer=False)
                self.guard.keep(snapshot, range(len(self.blocks)))
        return StepResult(losses, local)

    def local_step(
        self, block: Block, batch: Batch, values: Mapping[str, Any], options: StepOptions, *, independent: bool
    ) -> tuple[Tensor, Values, Any]:
        """Do forward, local loss and backward of one block: :meth:`forward`, then :meth:`walk_back`.

        Returns:
            The local loss, the exports by name, and the local output, all detached.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite, and the verdict was not deferred.
        """
        pending = self.forward(block, batch, values, options, independent=independent)
        self.walk_back(pending, options)
        return pending.loss, pending.exports, pending.local

    def forward(
        self, block: Block, batch: Batch, values: Mapping[str, Any], options: StepOptions, *, independent: bool
    ) -> Pending:
        """Do forward and local loss of one block; its exports may be handed on before :meth:`walk_back`.

        Args:
            block: the block to run.
            batch: gives inputs, target and the step's number.
            values: what the block reads, by name.
            options: how the step is done.
            independent: whether the block's buffers are restored here if its loss or gradient is not finite. If False,
                the check may be deferred in any case, and the caller protects the buffers of all blocks.

        Raises:
            NonFiniteLossError: the loss is not finite, and the verdict was not deferred.
        """
        graph = options.graphs[block.index] if options.graphs is not None else block.graph(batch.training)
        with self.guard.protecting(options.buffers_of(block) if independent else []) as snapshot:
            with casting(block.device, options.autocast):
                with self.seeded(block, batch.step):
                    exports, local = run_graph(graph, values)
                loss = total = self.local_loss(block, local, batch.target_on(block.device), batch.inputs)
                if options.block_loss is not None:
                    total = options.block_loss(block, batch, dict(values), exports, loss)
            self.guard.check(block.index, batch.step, total, defer=options.defer or not independent)
        return Pending(
            block=block,
            step=batch.step,
            total=total,
            loss=loss.detach(),
            exports=detached(exports),
            local=map_tensors(Tensor.detach, local),
            snapshot=snapshot,
            independent=independent,
        )

    def walk_back(self, pending: Pending, options: StepOptions) -> None:
        """Do the backward pass of a block whose forward is done, once; it frees the block's graph.

        Raises:
            NonFiniteGradientError: a gradient is not finite, and the verdict was not deferred.
            ScheduleError: it was done already.
        """
        block, total, pending.total = pending.block, pending.total, None
        if total is None:
            raise ScheduleError(f"the backward pass of block {block.index} in step {pending.step} was done already.")
        with pending.snapshot as snapshot:
            self.loss_backward(block, total, options.scaler(block), options.weight)
            self.guard.settle(block.index, snapshot)
            if pending.independent:
                checked = self._gradients(block, options)
                self.guard.check_gradients(checked, pending.step, self.parameter_names, defer=options.defer)
                self.guard.keep(snapshot, [block.index])

    def local_loss(self, block: Block, local: Any, target: Any, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Return the loss on a block's local output.

        Args:
            block: the block that made `local`.
            local: its local output: what its head returns, or for the last block what the model returns.
            target: the target of the batch.
            inputs: the net's inputs by argument name, for a loss that replaces the model's own.

        Raises:
            DataError: the loss cannot take the target; with both shapes.
            OutputError: the loss is not a scalar tensor.
        """
        read = to_device(dict(inputs or {}), block.device) if block.objective is not None else {}
        target = to_device(target, block.device)
        last = block is self.blocks[-1]
        if self.misfit and not last and block.objective is None:
            raise ScheduleError(self.misfit)
        call = "loss(output, target)" if block.objective is None else "local_loss.loss(output, inputs, target)"
        try:
            if block.objective is not None:
                loss = block.objective.loss(split_local(local)[0] if not last else local, read, target)
            elif self.loss is None:
                raise ScheduleError("this net has no loss: hand one to decouple(..., loss=...) or load(..., loss=...).")
            elif last:
                loss = self.output.final_loss(self.loss, local, target)
            else:
                local = to_device(local, block.device)  # what it was given
                loss = self.output.head_loss(self.loss, local, target)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError as well, but not one about the target
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"the loss cannot take the output of block {block.index}, {_shapes(local)}, with the target, "
                f"{_shapes(target)}: {type(error).__name__}: {error}. The loss is called as {call}."
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise OutputError(f"{call} must return a scalar tensor, not {_shapes(loss)}.")
        return loss

    def require_heads(self, who: str) -> None:
        """Check that every block but the last has a head that fits; `who` needs them, for the error's text.

        Raises:
            ScheduleError: a block has none, or one that does not fit any more.
        """
        if self.misfit:
            raise ScheduleError(self.misfit)
        missing = [block.index for block in self.blocks[:-1] if block.head is None]
        if missing:
            raise ScheduleError(
                f"{who} trains every block by a local loss, but blocks {missing} have no head. Lower the net with "
                "heads (leave out heads=False), or train it with a schedule that needs none "
                "(sedona_fx.train.Backprop, sedona_fx.train.Delayed)."
            )

    def loss_backward(
        self, block: Block, loss: Tensor, scaler: Any, weight: float, *, retain_graph: bool = False
    ) -> None:
        """Add the gradient of a block's loss, times `weight` and the scaler's scale, to ``.grad``.

        Args:
            block: the block that the loss is of.
            loss: a scalar with its graph.
            scaler: the block's gradient scaler, or None.
            weight: factor of the loss.
            retain_graph: keep the graph for a second backward pass.

        Raises:
            DataError: the loss has no graph, although the block has trainable parameters.
        """
        if not loss.requires_grad:
            if can_train(block.module):
                raise DataError(
                    f"the loss of block {block.index} has no gradient. It is computed as loss(output, target) and must "
                    "stay a tensor with a graph: no .item(), .detach() or numpy on the way."
                )
            return  # a frozen block, or one whose weights work under no_grad
        weighted = loss * weight if weight != 1.0 else loss
        with no_autocast(block.device):
            (scaler.scale(weighted) if scaler is not None else weighted).backward(retain_graph=retain_graph)

    def hand_on(self, block: Block, values: Values, exports: Mapping[str, Any], training: bool) -> None:
        """Add a block's exports, detached, to `values`, and drop from them what no later block reads."""
        hand_on(values, exports, block.index, self._last_reader[training])

    def _gradients(self, block: Block, options: StepOptions) -> list[Gradients]:
        """Return the gradients of a block for the guard; none if somebody else checks them."""
        scaler = options.scaler(block)
        if not options.guard_gradients or (scaler is not None and scaler.is_enabled()):
            return []
        return [Gradients(block.index, trained_in(block.module))]

    def parameter_names(self) -> dict[nn.Parameter, str]:
        """Return the names of the parameters of all blocks, for error texts."""
        return parameter_names(self.blocks)

    def at(self, version: int) -> None:
        """Note how often modules and tensors of the net were replaced so far."""
        if version != self._version:
            self._version = version
            self._draws.clear()

    def buffers(self) -> list[Tensor]:
        """Return the buffers of all blocks, each once."""
        return buffers_of(*self.blocks)

    def seeded(self, block: Block, step: int) -> AbstractContextManager[None]:
        """Return a context that seeds a block's random draws from (seed, block, step).

        A net of one block draws from the global streams instead: it trains exactly as backprop does. Around a block
        that draws nothing, nothing is seeded.
        """
        if len(self.blocks) == 1:
            return turn()
        if block.index not in self._draws:
            self._draws[block.index] = may_draw(block.module) or may_draw(block.eval_module)
        if not self._draws[block.index]:
            return nullcontext()
        return block_random(self.seed, block.index, step, block.device, python=self._runs_python[block.index])


def require_grad_mode(who: str) -> None:
    """Raise :class:`ScheduleError` if gradients are disabled: a forward pass would make no graph for `who`."""
    if not torch.is_grad_enabled():
        raise ScheduleError(f"{who} inside torch.no_grad() (or inference mode) has no graph to walk back.")


def _shapes(value: Any) -> str:
    """Return shape and dtype of a tensor, or the shapes inside a container, for error texts."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{type(value).__name__} of {[tuple(t.shape) for t in leaves]}" if leaves else type(value).__name__
