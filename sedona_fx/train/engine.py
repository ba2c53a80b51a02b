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
from sedona_fx.local_loss import LocalLoss
from sedona_fx.outputs import OutputFormat, map_tensors
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
        objective: what the block learns instead of the model's task, or None.
    """

    def __init__(
        self,
        train: BlockGraph,
        evaluation: BlockGraph,
        head: nn.Module | None,
        device: torch.device,
        objective: LocalLoss | None = None,
    ) -> None:
        self.index = train.index
        self.train_graph, self.eval_graph = train, evaluation
        self.module: fx.GraphModule = train.module
        self.eval_module: fx.GraphModule = evaluation.module
        self.head, self.device, self.objective = head, device, objective

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
        self._last_reader = {
            mode: {name: block.index for block in self.blocks for name in block.graph(mode).inputs}
            for mode in (True, False)
        }

    def local_losses(self, inputs: Mapping[str, Any], target: Any, *, training: bool, step: int) -> list[Tensor]:
        """Return the K local losses with their graphs, block by block; nothing flows between blocks."""
        self.require_heads("net.losses")
        values, losses = dict(inputs), []
        for block in self.blocks:
            with self._random(block, step):
                exports, local = block(values, training)
            losses.append(self.local_loss(block, local, target, inputs))
            self._hand_on(block, values, exports, training)
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
        defer: bool = False,
    ) -> StepResult:
        """Forward, local loss, backward and free, one block after the other; gradients go to ``.grad``.

        `on_block` is called when a block's gradients are complete: the next block has not run yet, and reads the
        activation from before whatever `on_block` does to the parameters. Without `on_block` it is all or nothing: the
        buffers of every block are put back if any loss is not finite, and the host waits for the losses once, at the
        end. With it, a block stands for itself; the host waits for each loss, or with `defer` not at all: `on_block`
        then steps through the guard.
        """
        self.require_heads("net.backward")
        if not torch.is_grad_enabled():
            raise ScheduleError("net.backward inside torch.no_grad() (or inference mode) has no graph to walk back.")
        self.guard.raise_pending()
        whole = on_block is None
        values, losses, local = dict(inputs), [], None
        with self.guard.protecting(self._buffers()) if whole else nullcontext():
            for block in self.blocks:
                with self.guard.protecting([] if whole else block.buffers()) as snapshot:
                    with self._random(block, step):
                        exports, local = block(values, training)
                    loss = self.local_loss(block, local, target, inputs)
                    self.guard.check(block.index, step, loss, defer=defer or whole)
                    self._walk_back(block, loss, scaler, weight)
                    self.guard.settle(block.index, snapshot)
                losses.append(loss.detach())
                self._hand_on(block, values, exports, training)
                local = map_tensors(Tensor.detach, local)
                del exports, loss  # the graph of this block dies here, before the next block runs
                if on_block is not None:
                    on_block(block.index)
            if whole:
                self.guard.raise_pending()
        return StepResult(losses, local)

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
                "heads (leave out heads=False), or train it with a schedule that needs none (sedona_fx.train.Backprop)."
            )

    def _walk_back(self, block: Block, loss: Tensor, scaler: Any, weight: float) -> None:
        if not loss.requires_grad:
            if any(p.requires_grad for p in block.parameters()):
                raise DataError(
                    f"the loss of block {block.index} has no gradient. It is computed as loss(output, target) and must "
                    "stay a tensor with a graph: no .item(), .detach() or numpy on the way."
                )
            return  # a frozen block
        scaled = loss * weight if weight != 1.0 else loss
        with no_autocast(block.device):
            (scaler.scale(scaled) if scaler is not None else scaled).backward()

    def _hand_on(self, block: Block, values: dict[str, Any], exports: dict[str, Any], training: bool) -> None:
        """Pass a block's exports on, cut off from its graph, and drop what no later block reads."""
        values.update({name: map_tensors(Tensor.detach, value) for name, value in exports.items()})
        last_reader = self._last_reader[training]
        for name in [name for name in values if last_reader.get(name, -1) <= block.index]:
            del values[name]

    def _buffers(self) -> list[Tensor]:
        return list({id(buffer): buffer for block in self.blocks for buffer in block.buffers()}.values())

    def _random(self, block: Block, step: int) -> AbstractContextManager[None]:
        # One block is backprop, which draws from the global stream as the plain model does.
        if len(self.blocks) == 1:
            return nullcontext()
        return block_random(self.seed, block.index, step, block.device)


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Leave the user's autocast region: backward runs in the dtypes that forward chose.

    The weights that autocast has cast and cached are dropped at the end: a region may span several steps, and what is
    cached is from before the update.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
        torch.clear_autocast_cache()
    else:
        yield


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return f"{type(value).__name__} of {[tuple(t.shape) for t in leaves]}" if leaves else type(value).__name__
