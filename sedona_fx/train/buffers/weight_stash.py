"""Run a block on other tensors than its own: on copies of its parameters, or on buffers to throw away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Slots:
    """Every place where the modules of a block hold a tensor.

    ``torch.func.functional_call`` does the same by name; here the places are looked up once, tied tensors are one, and
    recurrent layers, which keep a list of their weights aside, see the replacements too.

    Args:
        roots: the modules that run the block.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = {id(m): m for root in roots for m in root.modules()}.values()
        owners: list[dict[str, Any]] = [owner for m in modules for owner in (m._parameters, m._buffers) if owner]
        self._owners = owners
        self._recurrent = [m for m in modules if isinstance(m, nn.RNNBase)]

    @contextmanager
    def holding(self, replacements: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Let the modules see other tensors in the place of their own."""
        changed: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for owner in self._owners:
                for name, tensor in owner.items():
                    if tensor is not None and tensor in replacements:
                        changed.append((owner, name, tensor))
                        owner[name] = replacements[tensor]
            self._refresh()
            yield
        finally:
            for owner, name, tensor in changed:
                owner[name] = tensor
            self._refresh()

    def _refresh(self) -> None:
        for module in self._recurrent:
            weights = [getattr(module, name, None) for name in module._flat_weights_names]
            vars(module)["_flat_weights"] = weights


def copies(parameters: Iterable[nn.Parameter], values: Iterable[Tensor] | None = None) -> dict[Tensor, Tensor]:
    """Return for each parameter a copy that later steps leave alone; gradients flow through it to the parameter.

    Args:
        parameters: those that are trained.
        values: numbers to put into the copies; None: the parameters' own.
    """
    made: dict[Tensor, Tensor] = {}
    with torch.enable_grad():
        for parameter in parameters:
            made[parameter] = parameter.clone()
    if values is not None:
        for copy, value in zip(made.values(), values, strict=True):
            copy.detach().copy_(value)  # cloning saves nothing for its backward that this could spoil
    return made
