"""One block of a net, as schedules see it: its graphs, head, parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.heads.objective import LocalLoss
from sedona_fx.ir.graph import HEADS, BlockGraph
from sedona_fx.runtime.run import run_graph


@dataclass(frozen=True)
class StepResult:
    """What a training step returns.

    Attributes:
        losses: detached scalars: one per block, or only the final loss for schedules without local losses.
        output: the model's output, detached; None if the last block did not run in this step.
    """

    losses: list[Tensor]
    output: Any


class Block:
    """One block of a net: its train graph and its eval graph over the same modules, and its head.

    Args:
        train: the block's graph in train mode, head included.
        evaluation: the block's graph in eval mode.
        head: the auxiliary head, or None.
        device: where the block's parameters are.
        objective: a loss that replaces the model's own in this block, or None.

    Attributes:
        index: position in the net; 0 is nearest the input.
        train_graph: `train`.
        eval_graph: `evaluation`.
        module: the train graph's module (head included): ``(exports, local output) = module(*inputs)``.
        eval_module: the eval graph's module; the same object as `module` where the modes do not differ.
        head: the auxiliary head, or None (last block, or a net without heads).
        device: where the block's parameters are.
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
        """Yield the block's parameters that belong to the user's model, not to the head."""
        heads = {id(p) for p in self.head.parameters()} if self.head is not None else set()
        return (p for p in self.module.parameters() if id(p) not in heads)

    def buffers(self) -> list[Tensor]:
        """Return the block's buffers, those of its head included."""
        return buffers_in(self.module)

    def graph(self, training: bool) -> BlockGraph:
        """Return the block's train graph or its eval graph."""
        return self.train_graph if training else self.eval_graph

    def __call__(self, values: Mapping[str, Any], training: bool) -> tuple[dict[str, Any], Any]:
        """Run the block's forward pass.

        Args:
            values: what the block reads, by name.
            training: whether to run the train graph or the eval graph.

        Returns:
            The exports by name, not detached, and the local output.
        """
        return run_graph(self.graph(training), values)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Block({self.index}, {count:,} parameters, head={type(self.head).__name__}, device={self.device})"


def buffers_in(module: nn.Module) -> list[Tensor]:
    """Return the buffers of a module, each once: ``module.buffers()`` in a third of the time, for every step."""
    found: dict[int, Tensor] = {}
    modules, seen = [module], set[int]()
    while modules:
        module = modules.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.update((id(buffer), buffer) for buffer in module._buffers.values() if buffer is not None)
            modules += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def buffers_of(*blocks: Block) -> list[Tensor]:
    """Return the buffers of these blocks, each once."""
    return list({id(buffer): buffer for block in blocks for buffer in block.buffers()}.values())


def users_of(held: Iterable[Iterable[nn.Parameter]]) -> dict[nn.Parameter, list[int]]:
    """Return, for each parameter, the indices of the blocks that use it, in order.

    Args:
        held: for each block, its parameters, each once.
    """
    users: dict[nn.Parameter, list[int]] = {}
    for index, parameters in enumerate(held):
        for parameter in parameters:
            users.setdefault(parameter, []).append(index)
    return users


def parameter_names(blocks: Iterable[Block]) -> dict[nn.Parameter, str]:
    """Return the names of the parameters of these blocks: as in the user's model, those of heads with ``heads.``."""
    named = [pair for block in blocks for pair in block.module.named_parameters()]
    return {p: f"heads{name.removeprefix(HEADS)}" if name.startswith(HEADS) else name for name, p in named}
