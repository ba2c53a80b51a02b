"""What is not finite in a training step of a search: no optimizer may step on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sedona_fx.runtime.gradients import gradients_of, not_finite, where_not_finite


def step_fault(
    losses: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    names: Callable[[], Iterable[tuple[str, nn.Parameter]]],
) -> str:
    """Return which loss or gradient of a step is infinite or NaN, in words, or ``""``; the host waits for all at once.

    Call it behind the backward pass, and before the optimizer steps.

    Args:
        losses: what each is the loss of, in words -> the loss, 0-d; those that others follow from come first.
        optimizer: whose parameters have the gradients; None: nothing is trained.
        names: gives the parameters by name, in the order of the net; called for an error alone.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    gradients = gradients_of(parameter for group in groups for parameter in group["params"])
    flags = [loss.detach().isfinite() for loss in losses.values()]
    if gradients:
        flags.append(not_finite(gradients) == 0)
    finite = torch.stack(flags).tolist()
    if all(finite):
        return ""
    bad = finite.index(False)
    if bad < len(losses):
        of, loss = list(losses.items())[bad]
        return f"the loss of {of} is {loss.item()}"
    name, value = where_not_finite(names())
    return f"the gradient of {name!r} holds {value}, although the losses are finite"
