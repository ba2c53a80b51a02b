"""The block engine: run a block, take its local loss, walk back inside the block, free its graph, go on.

Every schedule is a small file on top of this one. The engine knows the boundary rule's two ends: what enters a block
from below is detached here (the exports of a block are not), and what enters it from above is for the schedule to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.outputs import OutputFormat
from sedona_fx.passes.partition import BlockGraph
from sedona_fx.train.guard import FiniteGuard
from sedona_fx.train.random import block_random

Loss = Callable[[Any, Any], Tensor]
OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class StepResult:
    """What a training step gave: the K local losses (detached scalars) and the model's output (detached)."""

    losses: list[Tensor]
    output: Any


class Block:
    """One block of a net: its train graph and its eval graph over the same modules, and its head.

    Attributes:
        index: 0 is nearest the input.
        module: the train graph (head included), ``(exports, local output) = module(*inputs)``.
        eval_module: the same for evaluation; one object with `module` where the modes do not differ.
        head: the auxiliary head, or None (last block, or a net without heads).
        device: where the block lives.
    """

    def __init__(self, train: BlockGraph, evaluation: BlockGraph, head: nn.Module | None, device: torch.device) -> None:
        self.index = train.index
        self.train_graph, self.eval_graph = train, evaluation
        self.module: fx.GraphModule = train.module
        self.eval_module: fx.GraphModule = evaluation.module
        self.head, self.device = head, device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the block's parameters, those of its head included, each once."""
        return self.module.parameters()

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that belong to the user's model."""
        heads = {id(p) for p in self.head.parameters()} if self.head is not None else set()
        return (p for p in self.module.parameters() if id(p) not in heads)

    def buffers(self) -> list[Tensor]:
        """Return the block's buffers, those of its head included."""
        return list(self.module.buffers())

    def graph(self, training: bool) -> BlockGraph:
        """Return the block's graph of a mode."""
        return self.train_graph if training else self.eval_graph

    def __call__(self, values: Mapping[str, Any], training: bool) -> tuple[dict[str, Any], Any]:
        """Run the block on named values; return its exports by name, undetached, and its local output."""
        graph = self.graph(training)
        exports, local = graph.module(*[values[name] for name in graph.inputs])
        return dict(zip(graph.exports, exports, strict=True)), local

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Block({self.index}, {count:,} parameters, head={type(self.head).__name__}, device={self.device})"


class Engine:
    """Runs the blocks of one net."""

    def __init__(self, blocks: Sequence[Block], output: OutputFormat, loss: Loss | None, seed: int) -> None:
        self.blocks, self.output, self.loss, self.seed = list(blocks), output, loss, seed
        self.guard = FiniteGuard()

    @property
    def has_heads(self) -> bool:
        """Whether every block but the last has a head."""
        return all(block.head is not None for block in self.blocks[:-1])

    def local_losses(self, inputs: Mapping[str, Any], target: Any, *, training: bool, step: int) -> list[Tensor]:
        """Return the K local losses with their graphs, block by block; nothing flows between blocks."""
        self.require_heads("net.losses")
        values, losses = dict(inputs), []
        for block in self.blocks:
            with self._random(block, step):
                exports, local = block(values, training)
            losses.append(self.local_loss(block, local, target))
            values.update(detached(exports))
        return losses

    def backward(
        self,
        inputs: Mapping[str, Any],
        target: Any,
        *,
        step: int,
        training: bool = True,
        scaler: Any = None,
        weight: float = 1.0,
        on_block: OnBlock | None = None,
    ) -> StepResult:
        """Forward, local loss, backward and free, one block after the other; gradients go to ``.grad``.

        `on_block` is called when a block's gradients are complete: the next block has not run yet, and reads the
        activation from before whatever `on_block` does to the parameters.
        """
        self.require_heads("net.backward")
        self.guard.raise_pending()
        values, losses, local = dict(inputs), [], None
        for block in self.blocks:
            buffers = block.buffers() if training else []
            before = self.guard.remember(buffers)
            with self._random(block, step):
                exports, local = block(values, training)
            loss = self.local_loss(block, local, target)
            self.guard.check(block.index, step, loss, buffers, before)
            scaled = loss * weight if weight != 1.0 else loss
            if scaled.requires_grad:  # a frozen block has nothing to walk back through
                with no_autocast(block.device):
                    (scaler.scale(scaled) if scaler is not None else scaled).backward()
            losses.append(loss.detach())
            values.update(detached(exports))
            local = pytree.tree_map_only(Tensor, Tensor.detach, local)
            del exports, loss, scaled  # the graph of this block dies here, before the next block runs
            if on_block is not None:
                on_block(block.index)
        return StepResult(losses, local)

    def local_loss(self, block: Block, local: Any, target: Any) -> Tensor:
        """Return the loss on a block's local output.

        Raises:
            DataError: the loss cannot take the target; with both shapes.
        """
        if self.loss is None:
            raise ScheduleError("this net has no loss: hand one to decouple(..., loss=...) or load(..., loss=...).")
        target = pytree.tree_map_only(Tensor, lambda t: t.to(block.device), target)
        last = block is self.blocks[-1]
        try:
            if last:
                loss = self.output.final_loss(self.loss, local, target)
            else:
                loss = self.output.head_loss(self.loss, local, target)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"the loss cannot take the output of block {block.index}, {_shapes(local)}, with the target, "
                f"{_shapes(target)}: {type(error).__name__}: {error}. The loss is called as loss(output, target)."
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise OutputError(f"loss(output, target) must return a scalar tensor, not {_shapes(loss)}.")
        return loss

    def require_heads(self, who: str) -> None:
        """Raise if a block has no head."""
        missing = [block.index for block in self.blocks[:-1] if block.head is None]
        if missing:
            raise ScheduleError(
                f"{who} trains every block by a local loss, but blocks {missing} have no head. Lower the net with "
                "heads (leave out heads=False), or train it with a schedule that needs none (sedona_fx.train.Backprop)."
            )

    def _random(self, block: Block, step: int) -> AbstractContextManager[None]:
        # One block is backprop, which draws from the global stream as the plain model does.
        if len(self.blocks) == 1:
            return nullcontext()
        return block_random(self.seed, block.index, step, block.device)


def detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return named values with every tensor cut off from its graph (no copy)."""
    return {name: pytree.tree_map_only(Tensor, Tensor.detach, value) for name, value in values.items()}


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Leave the user's autocast region: backward runs in the dtypes that forward chose."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{type(value).__name__} of {[tuple(t.shape) for t in leaves]}" if leaves else type(value).__name__
