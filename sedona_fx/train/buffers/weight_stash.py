"""Run a block on other tensors than its own: on copies of its parameters, or on temporary buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Slots:
    """Every place where the modules of a block hold a parameter or buffer, so that others can be put there.

    ``torch.func.functional_call`` does the same by name. Here the places are looked up once, a tied tensor is replaced
    in all its places, and recurrent layers, which keep a separate list of their weights, see the replacements too.

    Args:
        roots: the modules that run the block.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = {id(m): m for root in roots for m in root.modules()}.values()
        holders: list[dict[str, Any]] = [holder for m in modules for holder in (m._parameters, m._buffers) if holder]
        self._holders = holders
        self._recurrent = [m for m in modules if isinstance(m, nn.RNNBase)]

    @contextmanager
    def holding(self, replacements: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Let the modules hold other tensors while the body runs.

        Args:
            replacements: for tensors of the modules, those that take their places.
        """
        changed: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for holder in self._holders:
                for name, tensor in holder.items():
                    if tensor is not None and tensor in replacements:
                        changed.append((holder, name, tensor))
                        holder[name] = replacements[tensor]
            self._refresh_recurrent()
            yield
        finally:
            for holder, name, tensor in changed:
                holder[name] = tensor
            self._refresh_recurrent()

    def _refresh_recurrent(self) -> None:
        """Update the separate lists of weights that recurrent layers keep."""
        for module in self._recurrent:
            weights = [getattr(module, name, None) for name in module._flat_weights_names]
            vars(module)["_flat_weights"] = weights


def copies(parameters: Iterable[nn.Parameter], values: Iterable[Tensor] | None = None) -> dict[Tensor, Tensor]:
    """Return, for each parameter, a copy that later optimizer steps do not change.

    Gradients flow through the copy into the parameter's own ``.grad``.

    Args:
        parameters: the trained parameters.
        values: numbers to put into the copies; None: the parameters' own.
    """
    clones: dict[Tensor, Tensor] = {}
    with torch.enable_grad():
        for parameter in parameters:
            clones[parameter] = parameter.clone()
    if values is not None:
        for clone, value in zip(clones.values(), values, strict=True):
            clone.detach().copy_(value)  # safe in place: the backward of clone() saves nothing
    return clones
