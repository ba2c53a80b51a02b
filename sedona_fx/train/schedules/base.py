"""What all schedules share: one optimizer a block from a factory, windows of accumulation, and state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sedona_fx.errors import CheckpointError, ScheduleError
from sedona_fx.rng import random_states, restore_random
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.precision import check_autocast

if TYPE_CHECKING:
    from sedona_fx.net.net import Net

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Schedule:
    """Base of all schedules.

    A parameter used in several blocks belongs to the last of them: only its optimizer steps it, and only it clips it.

    Args:
        net: the net to train.
        optimizer: called once a block with that block's parameters; must optimize exactly those.
        clip: largest gradient norm of each block (L2), or None.
        accumulate: calls of :meth:`step` for one update; each batch counts 1/accumulate. All blocks update at the end
            of the same window of calls. A step that raises begins a new window.
        autocast: run forward and loss in ``torch.bfloat16`` or ``torch.float16``; with float16, the gradients of each
            block are scaled by a ``torch.amp.GradScaler`` of its own. None: as the caller has it.

    Attributes:
        optimizers: one a block, or None where nothing is to be trained.
        scalers: one a block, or None.
        parameters: for each block, the parameters that its optimizer steps.
        contributors: for each block, the blocks whose losses have a part in the gradients of `parameters`.
        parts: what a state of this kind of schedule holds besides what all have.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerFactory,
        *,
        clip: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not callable(optimizer):
            raise ScheduleError(
                f"optimizer= takes a factory, called once a block, and not {type(optimizer).__name__} itself. Write it "
                "as optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
            )
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ScheduleError(f"accumulate={accumulate!r} is no number of batches: give 1 or more.")
        check_autocast(autocast)
        self.net, self.clip, self.accumulate, self.autocast = net, clip, accumulate, autocast
        self.parameters, self.contributors = self._owners()
        if not any(self.parameters):
            raise ScheduleError("there is nothing to train: no parameter of the net requires a gradient.")
        self.optimizers = [
            _make(optimizer, parameters, index) if parameters else None
            for index, parameters in enumerate(self.parameters)
        ]
        self.scalers = self._make_scalers() if autocast is torch.float16 else None
        self._calls = 0  # of this window

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return what this schedule trains of a block."""
        return block.parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to train a step")

    def raise_pending(self) -> None:
        """Raise for a loss of the last step that was not finite, where that was not known yet; waits for the losses."""
        self.net.engine.guard.raise_pending()

    def shared(self) -> dict[str, list[int]]:
        """Return the trained parameters that several blocks use, by name, with these blocks."""
        names = {parameter: name for name, parameter in self.net.model.named_parameters()}
        users = self._users()
        return {names.get(p, "of a head"): blocks for p, blocks in users.items() if len(blocks) > 1}

    def _users(self) -> dict[nn.Parameter, list[int]]:
        users: dict[nn.Parameter, list[int]] = {}
        for block in self.net.blocks:
            for parameter in dict.fromkeys(self.block_parameters(block)):
                if parameter.requires_grad:
                    users.setdefault(parameter, []).append(block.index)
        return users

    def _owners(self) -> tuple[list[list[nn.Parameter]], list[set[int]]]:
        owned: list[list[nn.Parameter]] = [[] for _ in self.net.blocks]
        contributors = [{block.index} for block in self.net.blocks]
        users = self._users()
        for block in self.net.blocks:
            for parameter in dict.fromkeys(self.block_parameters(block)):
                if users.get(parameter, [-1])[-1] == block.index:
                    owned[block.index].append(parameter)
                    contributors[block.index].update(users[parameter])
        return owned, contributors

    def _refuse_shared(self, who: str, why: str) -> None:
        for name, blocks in self.shared().items():
            raise ScheduleError(
                f"{who} cannot train the parameter {name!r}, which blocks {blocks} share: {why}. Cut elsewhere, untie "
                "it, freeze it, or take Greedy, BackLink, Backprop or Delayed(weights='current')."
            )

    def _make_scalers(self) -> list[torch.amp.GradScaler]:
        """Return one scaler a block; one for all, where blocks add up the gradients of a parameter that they share."""
        if self._one_scaler():
            return [torch.amp.GradScaler(self.net.blocks[-1].device.type)] * len(self.net.blocks)
        scalers: list[torch.amp.GradScaler] = []
        for block, parameters in zip(self.net.blocks, self.parameters, strict=True):
            # Nothing of a frozen block ever finds that its scale is too large: it follows the block below.
            scalers.append(torch.amp.GradScaler(block.device.type) if parameters or not scalers else scalers[-1])
        return scalers

    def _one_scaler(self) -> bool:
        return bool(self.shared())

    @property
    def _weight(self) -> float:
        return 1.0 / self.accumulate

    @contextmanager
    def _window(self) -> Iterator[bool]:
        """Surround one step; gives whether it is the one that updates."""
        if not self._calls:
            self._zero_grad()
        self._scaled = set[int]()
        try:
            yield self._calls + 1 == self.accumulate
        except BaseException:
            self._zero_grad()
            self._calls = 0
            raise
        else:
            self._calls = (self._calls + 1) % self.accumulate
        finally:
            self._update_scalers()

    def _update_scalers(self) -> None:
        """Let the scalers of the blocks that stepped adapt; also where a later block failed."""
        for scaler in {id(s): s for s in self.scalers or [] if id(s) in self._scaled}.values():
            scaler.update()

    def _zero_grad(self, index: int | None = None) -> None:
        for optimizer in self.optimizers if index is None else [self.optimizers[index]]:
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    def _update(self, index: int, blocks: Collection[int]) -> None:
        """Clip and step what belongs to a block, unless the loss of one of `blocks` was not finite."""
        optimizer, scaler = self.optimizers[index], self._scaler(index)
        if optimizer is None or all(parameter.grad is None for parameter in self.parameters[index]):
            return
        if scaler is not None:
            scaler.unscale_(optimizer)
            self._scaled.add(id(scaler))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters[index], self.clip)
        self.net.engine.guard.step_optimizer(optimizer, blocks, scaler)

    def _step_block(self, index: int, blocks: Collection[int] | None = None) -> None:
        """Update a block, unless the loss of one of `blocks` (by default its contributors) was not finite, and drop its
        gradients: they need not outlive its step."""
        self._update(index, self.contributors[index] if blocks is None else blocks)
        self._zero_grad(index)

    def _scaler(self, index: int) -> torch.amp.GradScaler | None:
        return self.scalers[index] if self.scalers is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped; loads with ``weights_only=True``.

        Raises:
            NonFiniteLossError: of the last step, where that was not known yet.
        """
        self.raise_pending()
        return {
            **self._identity(),
            "steps": self.net.steps,
            "optimizers": [o.state_dict() if o is not None else None for o in self.optimizers],
            "scalers": [scaler.state_dict() for scaler in self.scalers] if self.scalers is not None else None,
            "calls": self._calls,
            "random": random_states({block.device for block in self.net.blocks}) if self.draws_globally else None,
            "gradients": [[p.grad for p in ps] for ps in self.parameters] if self._calls else None,
        }

    def check_state(self, state: Any) -> None:
        """Find out whether a state is one of this schedule, without loading anything.

        Raises:
            CheckpointError: the state belongs to another schedule, plan or optimizer.
        """
        if not isinstance(state, dict):
            raise CheckpointError(f"the state of a schedule is a dict, not {type(state).__name__}.")
        advice = {
            "schedule": "Go on with the schedule that wrote it.",
            "options": "Make the schedule with the options that it was written with.",
            "cuts": "Load it into a net made with the same plan.",
            "optimizer_types": "Go on with the optimizers that wrote it.",
            "optimizer_shapes": "Load it into a net made with the same plan, with the same parameters frozen.",
        }
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise CheckpointError(
                    f"the state does not fit: its {name.replace('_', ' ')} is {_short(state.get(name))}, here it is "
                    f"{_short(ours)}. {advice[name]}"
                )
        saved = state.get("optimizers")
        if (
            not {"steps", "calls", "gradients", "scalers", "random", *self.parts} <= state.keys()
            or not isinstance(saved, list)
            or len(saved) != len(self.optimizers)
        ):
            raise CheckpointError("the state of the schedule is not complete.")
        for index, (optimizer, theirs) in enumerate(zip(self.optimizers, saved, strict=True)):
            groups = [len(g["params"]) for g in optimizer.param_groups] if optimizer is not None else None
            found = [len(g["params"]) for g in theirs["param_groups"]] if theirs is not None else None
            if groups != found:
                raise CheckpointError(
                    f"the optimizer of block {index} has parameter groups of {groups} here and {found} in the state."
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Load the net's own state before; global random streams go on, too, where they are used.

        Raises:
            CheckpointError: the state belongs to another schedule, plan or optimizer; nothing is loaded then.
        """
        self.check_state(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(saved)
        for scaler, saved in zip(self.scalers or [], state["scalers"] or [], strict=True):
            scaler.load_state_dict(saved)
        self.net.steps, self._calls = int(state["steps"]), int(state["calls"])
        if self.draws_globally and state["random"] is not None:
            restore_random(state["random"])
        self._zero_grad()
        for parameters, gradients in zip(self.parameters, state["gradients"] or [], strict=False):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.device, copy=True) if gradient is not None else None

    @property
    def draws_globally(self) -> bool:
        """Whether draws come from the global streams, whose states then belong to the schedule's."""
        return len(self.net.blocks) == 1

    def options(self) -> dict[str, Any]:
        """Return the options of this kind of schedule that a state depends on, as plain values."""
        return {}

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same here and in a state that is loaded."""
        return {
            "schedule": type(self).__name__,
            "cuts": list(self.net.plan.cuts),
            "options": {"accumulate": self.accumulate, "autocast": str(self.autocast), **self.options()},
            "optimizer_types": [type(o).__name__ for o in self.optimizers],
            "optimizer_shapes": [[list(p.shape) for p in parameters] for parameters in self.parameters],
        }


def _make(factory: OptimizerFactory, parameters: list[nn.Parameter], index: int) -> torch.optim.Optimizer:
    made = factory(list(parameters))
    if not isinstance(made, torch.optim.Optimizer):
        raise ScheduleError(f"the optimizer factory returned {type(made).__name__}, not a torch.optim.Optimizer.")
    got = {id(p) for group in made.param_groups for p in group["params"]}
    wanted = {id(p) for p in parameters}
    if got != wanted:
        raise ScheduleError(
            f"the optimizer factory was called with the {len(wanted)} parameters of block {index} and returned an "
            f"optimizer of {len(got)} parameters, {len(got - wanted)} of them not of this block and "
            f"{len(wanted - got)} of the block's left out. Write it as optimizer=lambda params: "
            "torch.optim.SGD(params, lr=0.1)."
        )
    return made


def described(thing: Any) -> str:
    """Return what an object of the user's is, without its address: its repr, or the name of its class."""
    kind = type(thing)
    return repr(thing) if kind.__repr__ is not object.__repr__ else f"{kind.__module__}.{kind.__qualname__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."
