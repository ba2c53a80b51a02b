"""The block engine: run a block, take its local loss, walk back inside the block, free its graph, go on.

Every schedule is a small file on top of this one. The engine knows the boundary rule's two ends: what enters a block
from below is detached here (the exports of a block are not), and what enters it from above is for the schedule to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import Loss, OutputFormat, map_tensors
from sedona_fx.rng import block_random
from sedona_fx.runtime.block import Block, StepResult, buffers_of
from sedona_fx.runtime.guard import FiniteGuard
from sedona_fx.runtime.precision import casting, no_autocast
from sedona_fx.runtime.run import Values, detached, hand_on, last_readers, run_graph

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """One batch on its way through the blocks: the net's inputs by argument name, the target, and the step's number."""

    inputs: Mapping[str, Any]
    target: Any
    step: int
    training: bool = True


Objective = Callable[[Block, Batch, Values, Values, Tensor], Tensor]
"""What a block walks back: from its inputs, its exports (undetached) and its local loss."""


@dataclass(frozen=True)
class How:
    """How local steps are done: factor of the losses, one scaler a block, autocast, deferred verdicts, and what is
    added to the local losses (with the graphs that show what it looks at, and the buffers that it may change, too)."""

    weight: float = 1.0
    scalers: Sequence[Any] | None = None
    autocast: torch.dtype | None = None
    defer: bool = False
    objective: Objective | None = None
    graphs: Sequence[BlockGraph] | None = None
    buffers_of: Callable[..., list[Tensor]] = buffers_of

    def scaler(self, block: Block) -> Any:
        """Return the scaler of a block's gradients, or None."""
        return self.scalers[block.index] if self.scalers is not None else None


PLAIN = How()


class Engine:
    """Runs the blocks of one net."""

    def __init__(self, blocks: Sequence[Block], output: OutputFormat, loss: Loss | None, seed: int) -> None:
        self.blocks, self.output, self.loss, self.seed = list(blocks), output, loss, seed
        self.guard = FiniteGuard()
        self._last_reader = {mode: last_readers([block.graph(mode)] for block in self.blocks) for mode in (True, False)}

    def local_losses(self, batch: Batch) -> list[Tensor]:
        """Return the K local losses with their graphs, block by block; nothing flows between blocks."""
        self.require_heads("net.losses")
        values, losses = dict(batch.inputs), []
        for block in self.blocks:
            with self.random(block, batch.step):
                exports, local = block(values, batch.training)
            losses.append(self.local_loss(block, local, batch.target, batch.inputs))
            self.hand_on(block, values, exports, batch.training)
        return losses

    def backward(self, batch: Batch, how: How = PLAIN, on_block: OnBlock | None = None) -> StepResult:
        """Forward, local loss, backward and free, one block after the other; gradients go to ``.grad``.

        `on_block` is called when a block's gradients are complete: the next block has not run yet, and reads the
        activation from before whatever `on_block` does to the parameters. Without `on_block` it is all or nothing: the
        buffers of every block are put back if any loss is not finite, and the host waits for the losses once, at the
        end. With it, a block stands for itself; the host waits for each loss, or with ``how.defer`` not at all:
        `on_block` then steps through the guard.
        """
        self.require_heads("net.backward")
        require_grad_mode("net.backward")
        self.guard.raise_pending()
        whole = on_block is None
        values, losses, local = dict(batch.inputs), [], None
        with self.guard.protecting(how.buffers_of(*self.blocks)) if whole else nullcontext():
            for block in self.blocks:
                loss, exports, local = self.local_step(block, batch, values, how, alone=not whole)
                losses.append(loss)
                self.hand_on(block, values, exports, batch.training)
                if on_block is not None:
                    on_block(block.index)
            if whole:
                self.guard.raise_pending()
        return StepResult(losses, local)

    def local_step(
        self, block: Block, batch: Batch, values: Mapping[str, Any], how: How, *, alone: bool
    ) -> tuple[Tensor, Values, Any]:
        """Run one block and walk its local loss back; its graph is dead when this returns.

        Args:
            block: which one.
            batch: whose inputs, target and step number.
            values: what the block reads, by name.
            how: see there.
            alone: whether the block stands for itself: its buffers are put back if its loss is not finite. Else all
                verdicts are deferred, and whoever calls protects the buffers.

        Returns:
            The local loss, the exports by name, and the local output, all detached.
        """
        graph = how.graphs[block.index] if how.graphs is not None else block.graph(batch.training)
        with self.guard.protecting(how.buffers_of(block) if alone else []) as snapshot:
            with casting(block.device, how.autocast):
                with self.random(block, batch.step):
                    exports, local = run_graph(graph, values)
                loss = self.local_loss(block, local, batch.target, batch.inputs)
                total = loss
                if how.objective is not None:
                    total = how.objective(block, batch, dict(values), exports, loss)
            self.guard.check(block.index, batch.step, total, defer=how.defer or not alone)
            self.walk_back(block, total, how.scaler(block), how.weight)
            self.guard.settle(block.index, snapshot)
        return loss.detach(), detached(exports), map_tensors(Tensor.detach, local)

    def local_loss(self, block: Block, local: Any, target: Any, inputs: Mapping[str, Any] | None = None) -> Tensor:
        """Return the loss on a block's local output; an objective of the user's gets the net's `inputs`, too.

        Raises:
            DataError: the loss cannot take the target; with both shapes.
        """
        target, given = pytree.tree_map_only(Tensor, lambda t: t.to(block.device), (target, dict(inputs or {})))
        last = block is self.blocks[-1]
        call = "loss(output, target)" if block.objective is None else "local_loss.loss(output, inputs, target)"
        try:
            if block.objective is not None:
                loss = block.objective.loss(local, given, target)
            elif self.loss is None:
                raise ScheduleError("this net has no loss: hand one to decouple(..., loss=...) or load(..., loss=...).")
            elif last:
                loss = self.output.final_loss(self.loss, local, target)
            else:
                loss = self.output.head_loss(self.loss, local, target)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, but the target is not to blame
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"the loss cannot take the output of block {block.index}, {_shapes(local)}, with the target, "
                f"{_shapes(target)}: {type(error).__name__}: {error}. The loss is called as {call}."
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise OutputError(f"{call} must return a scalar tensor, not {_shapes(loss)}.")
        return loss

    def require_heads(self, who: str) -> None:
        """Raise if a block has no head."""
        missing = [block.index for block in self.blocks[:-1] if block.head is None]
        if missing:
            raise ScheduleError(
                f"{who} trains every block by a local loss, but blocks {missing} have no head. Lower the net with "
                "heads (leave out heads=False), or train it with a schedule that needs none "
                "(sedona_fx.train.Backprop, sedona_fx.train.Delayed)."
            )

    def walk_back(self, block: Block, loss: Tensor, scaler: Any, weight: float, *, keep: bool = False) -> None:
        """Take the gradient of a block's loss, times `weight` and the scaler's scale, into ``.grad``.

        Args:
            block: whose loss it is.
            loss: with its graph, which dies unless `keep`.
            scaler: of the block's gradients, or None.
            weight: factor of the loss.
            keep: keep the graph for another walk.
        """
        if not loss.requires_grad:
            if any(p.requires_grad for p in block.parameters()):
                raise DataError(
                    f"the loss of block {block.index} has no gradient. It is computed as loss(output, target) and must "
                    "stay a tensor with a graph: no .item(), .detach() or numpy on the way."
                )
            return  # a frozen block
        weighted = loss * weight if weight != 1.0 else loss
        with no_autocast(block.device):
            (scaler.scale(weighted) if scaler is not None else weighted).backward(retain_graph=keep)

    def hand_on(self, block: Block, values: Values, exports: Mapping[str, Any], training: bool) -> None:
        """Pass a block's exports on, cut off from its graph, and drop what no later block reads."""
        hand_on(values, exports, block.index, self._last_reader[training])

    def buffers(self) -> list[Tensor]:
        """Return the buffers of all blocks, each once."""
        return buffers_of(*self.blocks)

    def random(self, block: Block, step: int) -> AbstractContextManager[None]:
        """Seed a block's draws of a step. One block is backprop, which draws from the global stream."""
        if len(self.blocks) == 1:
            return nullcontext()
        return block_random(self.seed, block.index, step, block.device)


def require_grad_mode(who: str) -> None:
    """Raise where there would be no graph to walk back."""
    if not torch.is_grad_enabled():
        raise ScheduleError(f"{who} inside torch.no_grad() (or inference mode) has no graph to walk back.")


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{type(value).__name__} of {[tuple(t.shape) for t in leaves]}" if leaves else type(value).__name__
