"""Notice backpropagation by accident: ``loss(net(x), y).backward()``, which trains no head and saves nothing."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.ir.outputs import map_tensors


class Accident:
    """Warns once if a backward pass through what ``net(x)`` returned goes into the net's parameters.

    Args:
        blocks: number of blocks of the net.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks, self.told = blocks, False

    def watch(self, output: Any, model: nn.Module) -> None:
        """Look at the gradients of a forward pass in train mode.

        Args:
            output: what the net returned.
            model: whose parameters the net trains.
        """
        if self.told or not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return

        def on_gradient(_: Tensor) -> None:
            if not self.told and _accumulates(model):
                self.told = True
                warnings.warn(
                    f"loss(net(x), y).backward() is backpropagation through all {self.blocks} blocks: it trains no "
                    "head and saves no memory. To train the blocks by their local losses, call net.backward(x, y) in "
                    "the place of loss.backward(), or a schedule, sedona_fx.train.Greedy(net, ...).step(x, y) "
                    "(backpropagation on purpose is sedona_fx.train.Backprop). To look at outputs alone, call net(x) "
                    "in eval mode or under torch.no_grad().",
                    stacklevel=2,
                )

        def hook(tensor: Tensor) -> Tensor:
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(on_gradient)
            return tensor

        map_tensors(hook, output)


def _accumulates(model: nn.Module) -> bool:
    """Whether the backward pass that runs now adds to the ``.grad`` of a parameter: ``autograd.grad`` does not."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            try:
                node = torch.autograd.graph.get_gradient_edge(parameter).node
                if torch._C._will_engine_execute_node(node):
                    return True
            except RuntimeError:  # autograd.grad, which does not say
                return False
    return False
