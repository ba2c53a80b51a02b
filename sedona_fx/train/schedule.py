"""What all schedules share: one optimizer a block from a factory, learning rates, state, and the step count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedona_fx.errors import CheckpointError, ScheduleError
from sedona_fx.train.engine import Block, StepResult

if TYPE_CHECKING:
    from sedona_fx.net import Net

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Schedule:
    """Base of all schedules.

    Args:
        net: the net to train.
        optimizer: called once a block with that block's parameters; must optimize exactly those.
        clip: largest gradient norm of each block (L2), or None.
    """

    def __init__(self, net: Net, optimizer: OptimizerFactory, *, clip: float | None = None) -> None:
        self.net, self.clip = net, clip
        self.optimizers = [self._make(optimizer, block) for block in net.blocks]

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return what this schedule trains of a block."""
        return block.parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to train a step")

    def _make(self, factory: OptimizerFactory, block: Block) -> torch.optim.Optimizer | None:
        parameters = [p for p in self.block_parameters(block) if p.requires_grad]
        if not parameters:
            return None  # nothing to train: a frozen block
        made = factory(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ScheduleError(f"the optimizer factory returned {type(made).__name__}, not a torch.optim.Optimizer.")
        got = {id(p) for group in made.param_groups for p in group["params"]}
        wanted = {id(p) for p in parameters}
        if got != wanted:
            raise ScheduleError(
                f"the optimizer factory was called with the {len(wanted)} parameters of block {block.index} and "
                f"returned an optimizer of {len(got)} parameters, {len(got - wanted)} of them not of this block. Write "
                "it as optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
            )
        return made

    def _clip(self, block: Block) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.block_parameters(block), self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped; loads with ``weights_only=True``."""
        return {
            "schedule": type(self).__name__,
            "cuts": list(self.net.plan.cuts),
            "steps": self.net.steps,
            "optimizers": [o.state_dict() if o is not None else None for o in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: the state belongs to another schedule or another plan.
        """
        if state.get("schedule") != type(self).__name__:
            raise CheckpointError(f"the state is one of {state.get('schedule')!r}, not of {type(self).__name__!r}.")
        if state.get("cuts") != list(self.net.plan.cuts):
            raise CheckpointError(
                f"the state belongs to a plan with the cuts {state.get('cuts')}, this net is cut at "
                f"{list(self.net.plan.cuts)}. Load it into a net made with the same plan."
            )
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(saved)
        self.net.steps = int(state["steps"])
