"""One optimizer and one gradient scaler per block, and which parameters they are for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from sedona_fx.errors import ScheduleError
from sedona_fx.runtime.block import Block, users_of

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Called once per block with the parameters to optimize."""


def owned_parameters(trained: Sequence[Sequence[nn.Parameter]]) -> tuple[list[list[nn.Parameter]], list[set[int]]]:
    """Assign each parameter to the last block that uses it: by then all of its gradient has been added up.

    Args:
        trained: for each block, the parameters trained in it, each once.

    Returns:
        For each block, the parameters that its optimizer steps; and the blocks whose losses contribute to their
        gradients, the block itself included.
    """
    users = users_of(trained)
    owned = [[p for p in parameters if users[p][-1] == index] for index, parameters in enumerate(trained)]
    contributors = [{index, *(k for p in parameters for k in users[p])} for index, parameters in enumerate(owned)]
    return owned, contributors


def make_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter], index: int) -> torch.optim.Optimizer:
    """Call an optimizer factory for block `index`, and check that it optimizes exactly `parameters`.

    Raises:
        ScheduleError: it returned something else, an optimizer of other parameters, or one whose step takes a closure.
    """
    optimizer = factory(list(parameters))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ScheduleError(f"the optimizer factory returned {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    required = [
        argument.name
        for argument in inspect.signature(optimizer.step).parameters.values()
        if argument.default is argument.empty and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]
    if required:
        raise ScheduleError(
            f"{type(optimizer).__name__}.step needs {', '.join(required)}: it asks for the loss several times a step, "
            "and a schedule computes the loss of a block once. Take an optimizer that steps on given gradients (SGD, "
            f"Adam), or step {type(optimizer).__name__} yourself, with a closure that calls net.backward."
        )
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in parameters}
    if optimized != wanted:
        raise ScheduleError(
            f"the optimizer factory was called with the {len(wanted)} parameters of block {index} and returned an "
            f"optimizer of {len(optimized)} parameters, {len(optimized - wanted)} of them not of this block and "
            f"{len(wanted - optimized)} of the block's left out. Write it as optimizer=lambda params: "
            "torch.optim.SGD(params, lr=0.1)."
        )
    return optimizer


def refuse_unfrozen(frozen: Iterable[nn.Parameter], net: nn.Module, who: str) -> None:
    """Check that no parameter was unfrozen: no optimizer has it, so that it would never be stepped.

    Args:
        frozen: the parameters that required no gradient when the schedule was made.
        net: has their names.
        who: name of the schedule, for the error's text.

    Raises:
        ScheduleError: one requires a gradient.
    """
    unfrozen = [parameter for parameter in frozen if parameter.requires_grad]
    if unfrozen:
        names = {parameter: name for name, parameter in net.named_parameters()}
        raise ScheduleError(
            f"{names.get(unfrozen[0], 'a parameter')!r} was frozen when this {who} was made and requires a gradient "
            f"now ({len(unfrozen)} parameters do): no optimizer of its steps them. Make a new {who}, which trains them "
            "in the blocks they are in; decouple again for cuts that reckon with them."
        )


def make_scalers(
    blocks: Sequence[Block], parameters: Sequence[Sequence[nn.Parameter]], *, single: bool
) -> list[torch.amp.GradScaler]:
    """Return one gradient scaler per block.

    Args:
        blocks: the blocks of the net.
        parameters: for each block, the parameters that its optimizer steps.
        single: whether all blocks share one.
    """
    if single:
        return [torch.amp.GradScaler(blocks[-1].device.type)] * len(blocks)
    scalers: list[torch.amp.GradScaler] = []
    for block, owned in zip(blocks, parameters, strict=True):
        # A frozen block has no gradients that would show its scale to be too large: it takes that of the block before.
        scalers.append(torch.amp.GradScaler(block.device.type) if owned or not scalers else scalers[-1])
    return scalers
