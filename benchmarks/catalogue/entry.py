"""One model of the support table: how it is built, one batch for it, its loss, and how it is to be decoupled."""

from __future__ import annotations

import importlib
import importlib.util
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
        needs: the packages that it is made of, besides those that every test has: names as they are imported.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    pair: Callable[[], tuple[Any, Any]]
    loss: Loss | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    refused: str = ""
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that this model needs and that are not installed."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

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


def imported(package: str, name: str, *args: Any, **options: Any) -> nn.Module:
    """Build a model by the name of its class or function; the package is imported only now.

    Args:
        package: module that has the class.
        name: of the class or function in it.
        args: what it is called with.
        options: the same, by keyword.
    """
    maker: Any = getattr(importlib.import_module(package), name)
    model: nn.Module = maker(*args, **options)
    return model
