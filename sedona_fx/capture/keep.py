"""Run a model without a trace: its attributes, buffers, parameters and gradients are as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sedona_fx.capture.state_watch import StateWatch
from sedona_fx.rng import turn


@contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Restore on exit the model's attributes, buffers and gradients, and the states of the global random generators.

    Other threads wait for their turn with the generators meanwhile, since what they draw would be undone.
    """
    with turn(), keep_gradients(model):
        watch = StateWatch(model)
        try:
            yield
        finally:
            watch.restore()


@contextmanager
def keep_gradients(model: nn.Module) -> Iterator[None]:
    """Let parameters have no gradients in the body, where a forward may call ``backward``, and theirs on exit."""
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for parameter, gradient in gradients:
        if gradient is not None:
            parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient


@contextmanager
def keep_parameters(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Restore the values of the model's parameters on exit; the function tells whether any was overwritten so far."""
    copies = [(parameter, parameter._version, parameter.detach().clone()) for parameter in model.parameters()]

    def overwritten() -> bool:
        return any(p._version != version or not torch.equal(p, value) for p, version, value in copies)

    try:
        yield overwritten
    finally:
        for parameter, _, value in copies:
            if not torch.equal(parameter, value):
                parameter.data.copy_(value)
