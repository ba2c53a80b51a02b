"""One model of the support table: how it is built, one batch for it, its loss, and how it is to be decoupled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Entry:
    """A model of the table.

    Attributes:
        name: of the row, unique.
        family: of the table that the row stands in.
        build: makes the model; :meth:`make` seeds it.
        pair: makes one batch, (inputs, target), the same every time. Inputs as ``decouple`` takes them.
        loss: ``loss(output, target)``; None is cross entropy on the logits.
        options: what ``decouple`` is told besides the loss: ``root=``, ``output=``, ``heads=``, ``blocks=``.
        note: what the reader of the table should know about how the model was made.
        refused: a word of the error that this model must be refused with; empty where it must work.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    pair: Callable[[], tuple[Any, Any]]
    loss: Loss | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    refused: str = ""

    def make(self) -> nn.Module:
        """Build the model with the same weights every time, none of them zero."""
        torch.manual_seed(0)
        model = self.build()
        perturb(model)
        return model

    @property
    def criterion(self) -> Loss:
        """The loss that stands for None as well."""
        return self.loss if self.loss is not None else F.cross_entropy

    @property
    def headless(self) -> bool:
        """Whether the model is decoupled without heads: its output is nothing that a small head could imitate."""
        return self.options.get("heads", True) is False


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Add noise to every parameter: some start at zero, and zero weights hide wrong gradients."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
