"""Base class of all schedules: one optimizer per block, accumulation windows, gradient scaling, saved state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from sedona_fx.errors import ScheduleError
from sedona_fx.net.net import Net
from sedona_fx.net.parallel import require_unwrapped
from sedona_fx.net.wrapped import require_net
from sedona_fx.rng import random_states, restore_random
from sedona_fx.runtime.block import Block, StepResult, users_of
from sedona_fx.runtime.optimizer_state import counted_state, load_counted
from sedona_fx.runtime.precision import check_autocast
from sedona_fx.train.schedules.fitted import Fitted
from sedona_fx.train.schedules.optimizers import (
    OptimizerFactory,
    make_optimizer,
    make_scalers,
    owned_parameters,
    refuse_unfrozen,
)
from sedona_fx.train.schedules.state import check_identity, check_numbers, check_state
from sedona_fx.train.schedules.updating import Updating


class Schedule(Updating):
    """Base of all schedules: trains a net's blocks, each with an optimizer of its own.

    A parameter used in several blocks belongs to the last of them: only that block's optimizer steps it, and only that
    block clips it.

    To write a schedule of your own, subclass and override:

    - :meth:`on_gradients`, to change the gradients with which the optimizers of an existing schedule step;
    - :meth:`step`, for another way to compute gradients; it may subclass this class, or
      :class:`~sedona_fx.train.schedules.headed.Headed` if blocks train by local losses;
    - :meth:`block_parameters`, if not all parameters of a block are trained; :meth:`options`, if the schedule has
      settings that a saved state depends on.

    :meth:`step` adds gradients to ``.grad`` inside :meth:`accumulation_window`, and steps the blocks at the end of a
    window::

        def step(self, inputs, target):
            with self.accumulation_window() as updates:
                self.raise_pending()
                batch = self.net.batch(inputs, target)
                losses, output = ...  # loss * self.loss_weight, backward; self.net.engine does it block by block
                for block in self.net.blocks if updates else ():
                    self.step_block(block.index)
                self.net.steps += 1
            return StepResult(losses, output)

    Args:
        net: the net to train.
        optimizer: called once per block with that block's parameters; must optimize exactly those.
        clip: largest gradient norm (L2) of each block, or None.
        accumulate: calls of :meth:`step` per update; each batch counts 1/accumulate. All blocks update at the end of
            the same window of calls. A step that raises begins a new window.
        autocast: run forward and loss in ``torch.bfloat16`` or ``torch.float16``; with float16, the gradients of each
            block are scaled by a ``torch.amp.GradScaler`` of its own. None: the caller's own autocast state.

    Attributes:
        optimizers: one per block, or None where nothing is trained.
        scalers: one gradient scaler per block, or None.
        parameters: for each block, the parameters that its optimizer steps.
        contributors: for each block, the blocks whose losses contribute to the gradients of `parameters`.
        fitted: what ``fit`` did with the schedule; `epochs` counts the epochs.
        parts: the keys that the state of this kind of schedule has besides those of every schedule.

    Raises:
        ScheduleError: a setting has a value that it cannot have, or no parameter of the net requires a gradient.
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
        require_net(net, type(self).__name__)
        if not callable(optimizer):
            raise ScheduleError(
                f"optimizer= takes a factory, called once a block, and not {type(optimizer).__name__} itself. Write it "
                "as optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
            )
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ScheduleError(f"accumulate={accumulate!r} is no number of batches: give 1 or more.")
        check_autocast(autocast)
        self.net, self.clip, self.accumulate, self.autocast = net, clip, accumulate, autocast
        self._version = net.check()
        self._held = [list(self.block_parameters(block)) for block in net.blocks]
        self.parameters, self.contributors = owned_parameters([self.trained_parameters(b) for b in net.blocks])
        if not any(self.parameters):
            raise ScheduleError("there is nothing to train: no parameter of the net requires a gradient.")
        self.optimizers = [
            make_optimizer(optimizer, parameters, index) if parameters else None
            for index, parameters in enumerate(self.parameters)
        ]
        half = autocast is torch.float16
        self.scalers = make_scalers(net.blocks, self.parameters, single=self.single_scaler) if half else None
        self._frozen = [p for b in net.blocks for p in self.block_parameters(b) if not p.requires_grad]
        self.fitted = Fitted()
        self._calls = 0  # of step(), in this window
        self._number = net.steps  # of the step that runs
        self._unscaled: set[int] = set()  # ids of the scalers that unscaled gradients in this step

    # ---- to be overridden -------------------------------------------------------------------------------------------

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train on one batch; return losses and output, detached.

        Args:
            inputs: a tuple is positional arguments, a mapping is keywords, anything else is one argument.
            target: handed to the loss.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to train a step")

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of a block that this schedule trains, if they require a gradient."""
        return block.parameters()

    def options(self) -> dict[str, Any]:
        """Return the settings of this kind of schedule that a saved state depends on, as plain values."""
        return {}

    @property
    def draws_globally(self) -> bool:
        """Whether random draws come from the global streams, whose states are then part of the schedule's state."""
        return len(self.net.blocks) == 1

    @property
    def single_scaler(self) -> bool:
        """Whether all blocks share one gradient scaler: so it is where they add up the gradients of a parameter."""
        return bool(self.shared())

    # ---- for steps to use -------------------------------------------------------------------------------------------

    @contextmanager
    def accumulation_window(self) -> Iterator[bool]:
        """Surround one step: zero the gradients when a window of accumulation begins, or if the step raises.

        Gives True in the last step of the window, the one that updates the blocks.

        Raises:
            ScheduleError: a parameter that was frozen when the schedule was made now requires a gradient; the net
                cannot follow what was replaced in it; or the optimizers do not hold it.
            ParallelError: ``net.model`` is in a wrapper that would not train the net.
        """
        refuse_unfrozen(self._frozen, self.net, type(self).__name__)
        require_unwrapped(self.net.model)
        self._check_parameters()
        self.net.check_precision(self.autocast)
        if not self._calls:
            self.zero_grad()
        self._unscaled, self._number = set(), self.net.steps
        try:
            yield self._calls + 1 == self.accumulate
        except BaseException:
            self.zero_grad()
            self._calls = 0
            raise
        else:
            self._calls = (self._calls + 1) % self.accumulate
        finally:  # the scalers of the blocks that stepped adapt, also where a later block failed
            for scaler in {id(s): s for s in self.scalers or [] if id(s) in self._unscaled}.values():
                scaler.update()
            self.net.engine.guard.release()

    def _check_parameters(self) -> None:
        """Raise :class:`ScheduleError` if a block has other parameters than when the optimizers were made."""
        version = self.net.check()
        if version == self._version:
            return
        for block, held in zip(self.net.blocks, self._held, strict=True):
            if list(map(id, self.block_parameters(block))) != list(map(id, held)):
                name = type(self).__name__
                what = f"parameters of block {block.index} were replaced since this {name} was made"
                raise ScheduleError(f"{what}, whose optimizers hold the old ones: make a new {name}.")
        self._version = version

    @property
    def loss_weight(self) -> float:
        """Factor of a batch's loss: 1/accumulate."""
        return 1.0 / self.accumulate

    @property
    def epochs(self) -> int:
        """Epochs that ``fit`` has trained with this schedule; its next call goes on behind them."""
        return self.fitted.epochs

    def raise_pending(self) -> None:
        """Check the losses and gradients of the last step whose check was deferred; the host waits for them.

        Raises:
            NonFiniteLossError: one was not finite.
        """
        self.net.engine.guard.raise_pending()

    def trained_parameters(self, block: Block) -> list[nn.Parameter]:
        """Return the parameters of :meth:`block_parameters` that require a gradient, each once."""
        return [p for p in dict.fromkeys(self.block_parameters(block)) if p.requires_grad]

    def shared(self) -> dict[str, list[int]]:
        """Return the trained parameters that several blocks use: their names, and the indices of the blocks."""
        names = {parameter: name for name, parameter in self.net.model.named_parameters()}
        users = users_of([self.trained_parameters(block) for block in self.net.blocks])
        return {names.get(p, "of a head"): blocks for p, blocks in users.items() if len(blocks) > 1}

    def refuse_shared(self, who: str, why: str) -> None:
        """Check that no trained parameter is used in several blocks.

        Raises:
            ScheduleError: one is: `who` cannot train it, because of `why`.
        """
        for name, blocks in self.shared().items():
            raise ScheduleError(
                f"{who} cannot train the parameter {name!r}, which blocks {blocks} share: {why}. Cut elsewhere, untie "
                "it, freeze it, or take Greedy, BackLink, Backprop or Delayed(weights='current')."
            )

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped; loads with ``weights_only=True``.

        Its tensors are the schedule's own, as in state dicts of PyTorch; to go back to it in the same process, keep a
        ``copy.deepcopy``. A subclass that adds keys names them in `parts`.

        Raises:
            NonFiniteLossError: a loss or gradient of the last step was not finite; its check had been deferred.
        """
        self.raise_pending()
        return {
            **self._identity(),
            "steps": self.net.steps,
            "epochs": self.epochs,
            "optimizers": [counted_state(o) if o is not None else None for o in self.optimizers],
            "scalers": [scaler.state_dict() for scaler in self.scalers] if self.scalers is not None else None,
            "calls": self._calls,
            "random": random_states({block.device for block in self.net.blocks}) if self.draws_globally else None,
            "gradients": [[p.grad for p in ps] for ps in self.parameters] if self._calls else None,
        }

    def check_identity(self, state: Any) -> None:
        """Check that a state is of the same kind of schedule, with the same plan and options.

        Raises:
            CheckpointError: it is not.
        """
        check_identity(state, self._identity())

    def check_state(self, state: Any) -> None:
        """Check that a state belongs to this schedule; nothing is loaded.

        Raises:
            CheckpointError: it belongs to another schedule, plan or optimizer, or is damaged.
        """
        fields = {"steps", "epochs", "calls", "gradients", "scalers", "random", *self.parts}
        self.check_identity(state)
        check_state(state, fields, self.optimizers)
        check_numbers(state, self.parameters, self.scalers, self.accumulate)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which stays as it is. Load the net's own state first.

        Where the schedule draws from the global random streams, their states are restored as well.

        Raises:
            CheckpointError: the state belongs to another schedule, plan or optimizer; nothing is loaded then.
        """
        self.check_state(state)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                load_counted(optimizer, saved)
        for scaler, saved in zip(self.scalers or [], state["scalers"] or [], strict=True):
            scaler.load_state_dict(saved)
        self.net.steps, self._calls = state["steps"], state["calls"]
        self.fitted = Fitted(epochs=int(state["epochs"]), asked=int(state["epochs"]))
        if self.draws_globally and state["random"] is not None:
            restore_random(state["random"])
        self.zero_grad()
        for parameters, gradients in zip(self.parameters, state["gradients"] or [], strict=False):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter.device, copy=True) if gradient is not None else None

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal in this schedule and in a state that it loads."""
        return {
            "schedule": type(self).__name__,
            "cuts": list(self.net.plan.cuts),
            "options": {"accumulate": self.accumulate, "autocast": str(self.autocast), **self.options()},
            "optimizer_types": [type(o).__name__ for o in self.optimizers],
            "optimizer_shapes": [[list(p.shape) for p in parameters] for parameters in self.parameters],
        }
