"""Delayed gradients: DDG and Features Replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.late_buffers import overwrite
from sedona_fx.errors import NonFiniteGradientError, NonFiniteLossError, ScheduleError
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.net.net import Net
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import require_grad_mode
from sedona_fx.runtime.options import Batch
from sedona_fx.runtime.precision import casting, no_autocast, scaled, unscaled
from sedona_fx.runtime.run import Values, hand_on, last_readers, run_graph
from sedona_fx.train.buffers.in_flight import Flight, Held
from sedona_fx.train.buffers.weight_stash import Slots, copies
from sedona_fx.train.schedules.base import Schedule
from sedona_fx.train.schedules.headed import Check, check_mode
from sedona_fx.train.schedules.optimizers import OptimizerFactory
from sedona_fx.train.schedules.state import check_flight, check_held, require

Weights = Literal["stashed", "current"]


class Delayed(Schedule):
    """Delayed gradients: no block waits for the blocks after it, and no heads are needed.

    With K blocks, k = 0 nearest the input: at step t every block runs forward on batch t, and block k < K runs backward
    for the batch of step s = t - (K-1-k), with the gradient that block k+1 computed for it one step before. While
    s < 0, block k does not step. The loss is the model's own.

    ``weights="stashed"``: DDG, Decoupled Parallel Backpropagation (Huo, Gu, Yang, Huang 2018, Algorithm 1, eq. 10)::

        w_k(t+1) = w_k(t) - lr * grad_k f_batch(s) (w(s))

    at the *old* weights: each batch runs on a copy of the weights of its step, and its graph lives until its backward
    pass, so that block k holds at most K-k graphs. (The paper's released code runs backward through old activations and
    new weights: a third gradient.)

    ``weights="current"``: Features Replay (Huo, Gu, Huang 2018, Algorithm 1). Only the block's input is kept; the block
    runs forward again with the *current* weights w_k(t), with the random draws of its first run, and without a second
    update of BatchNorm's running statistics. One graph is alive at a time.

    A parameter shared by several blocks has a single version in ``"current"``: it gets the sum of their gradients, each
    with its own delay, and is stepped once. With ``"stashed"`` it is refused. Under float16 autocast, gradients are
    passed between blocks unscaled, in float32.

    Args:
        net: with or without heads; heads do not run, get no gradients, and are not stepped.
        optimizer: called once per block with the parameters of the user's model in that block.
        weights: see above.
        check: ``"async"``: blocks step without waiting for the loss of this batch, which does not contribute to their
            step yet; if it is not finite, the last block and all buffers are unharmed, and the batch is abandoned.
            ``"sync"``: no block steps then, either.
        options: see :class:`~sedona_fx.train.schedules.base.Schedule`.

    Raises:
        ScheduleError: blocks share a parameter, with ``"stashed"``; or a setting has a value that it cannot have.
    """

    parts: ClassVar[tuple[str, ...]] = ("flights",)

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerFactory,
        *,
        weights: Weights = "stashed",
        check: Check = "async",
        **options: Any,
    ) -> None:
        if weights not in ("stashed", "current"):
            raise ScheduleError(f"weights={weights!r} is neither 'stashed' nor 'current'.")
        check_mode(check)
        self.weights, self.check = weights, check
        super().__init__(net, optimizer, **options)
        if weights == "stashed":
            self.refuse_shared("Delayed(weights='stashed')", "each block would stash it at another age")
        self._graphs = net.variants.headless()
        self._last_reader = {mode: last_readers([graph] for graph in graphs) for mode, graphs in self._graphs.items()}
        hosts = [net.model] if net.capture.hosted else []
        self._slots = [Slots([g[block.index].module for g in self._graphs.values()] + hosts) for block in net.blocks]
        # Which values need a gradient, and the blocks that make them: the live ones from the first trained block on.
        first = next(block.index for block in net.blocks if self.trained_parameters(block))
        self._made_by = {
            mode: {name: graph.index for graph in graphs[first:] for name in graph.live_exports}
            for mode, graphs in self._graphs.items()
        }
        self._flights: deque[Flight] = deque(maxlen=len(net.blocks))  # oldest first

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of the user's model in a block, without those of the head."""
        return block.base_parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Run forward on one batch, and backward for one batch per block.

        Returns:
            The final loss alone, and the output, for the batch given.
        """
        net, engine, last = self.net, self.net.engine, self.net.blocks[-1]
        with self.accumulation_window() as updates:
            require_grad_mode("Delayed")
            self.raise_pending()
            batch = net.batch(inputs, target)
            flight = Flight(batch.step, batch.training, [None] * len(net.blocks))
            self._flights.append(flight)
            values = dict(batch.inputs)
            if len(net.blocks) > 1:  # kept beyond this step, and a data loader may reuse the tensors for its next batch
                values = {name: map_tensors(torch.clone, value) for name, value in values.items()}
            blocks_wait = self.check == "sync" or self.weights == "current"
            try:
                with engine.guard.protecting(engine.buffers()) as snapshot:
                    for block in net.blocks:
                        engine.guard.keep(snapshot.part(block.buffers()), [block.index])
                    for block in net.blocks[:-1]:
                        held, exports = self._forward(block, flight, values)
                        flight.held[block.index] = held
                        hand_on(values, exports, block.index, self._last_reader[batch.training])
                        del held, exports
                        if not blocks_wait:
                            self._delayed_step(block, updates)
                    loss, output, held = self._forward_last(batch, flight, values)
                    engine.guard.check(last.index, batch.step, loss, defer=self.check == "async")
                    engine.loss_backward(last, loss, self.scaler(last.index), self.loss_weight)
                    self._pass_down(last, flight, held)
                    engine.guard.settle(last.index, snapshot)
            except BaseException as error:
                if blocks_wait:  # no block has stepped: as if this batch had never been
                    self._flights.pop()
                else:
                    self._abandon(error)
                    flight.abandon()
                    net.steps += 1
                raise
            net.steps += 1
            try:
                for block in net.blocks[:-1] if blocks_wait else ():
                    self._delayed_step(block, updates and self.check == "async")
                if updates and self.check == "sync":
                    self.update_all(wait=True)
                    self.zero_grad()
                elif updates:
                    self.step_block(last.index, {last.index})
            except NonFiniteGradientError as error:
                self._abandon(error)
                raise
        return StepResult([loss.detach()], output)

    def raise_pending(self) -> None:
        """Check the loss and the gradients of the last step, if the check was deferred; abandon bad batches.

        Raises:
            NonFiniteLossError: one was not finite.
        """
        try:
            super().raise_pending()
        except NonFiniteLossError as error:
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        """Abandon the batches on which blocks failed in the last step: each block has one of its own age."""
        if isinstance(error, NonFiniteLossError):
            ages = [len(self.net.blocks) - 1 - block for block in error.blocks]
            for age in ages:
                if age < len(self._flights):
                    self._flights[-1 - age].abandon()

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, block: Block, flight: Flight, values: Values) -> tuple[Held, Values]:
        """Run a block on a new batch; return what it keeps of the batch, and its exports."""
        inputs = {name: values[name] for name in self._graph(block, flight).inputs}
        if self.weights == "current":
            with torch.no_grad():
                exports = self._run(block, flight, inputs)[0]
            torch.clear_autocast_cache()  # or the caller's autocast region would reuse weights cast without a graph
            return Held(inputs), exports
        buffers = self._buffers(block)
        held = Held(inputs, buffers=[buffer.clone() for buffer in buffers])
        updated = [buffer.clone() for buffer in buffers]
        self._run_stashed(block, flight, held, copies(self.trained_parameters(block)), updated)
        for buffer, value in zip(buffers, updated, strict=True):
            overwrite(buffer, value)
        return held, held.exports

    def _run_stashed(
        self, block: Block, flight: Flight, held: Held, weights: Mapping[Tensor, Tensor], buffers: Iterable[Tensor]
    ) -> None:
        """Run a block on copies of its weights and buffers; its exports, with their graph, are put into `held`.

        Args:
            block: the block.
            flight: the batch.
            held: gives the inputs; gets leaves in their place, the weights, and the exports.
            weights: for each trained parameter, the copy to run on.
            buffers: what to run on in the place of the block's buffers, updated in place. Normalisation layers save
                these for backward, so that each graph needs its own.
        """
        held.inputs = self._with_leaves(block, flight, held.inputs)
        held.weights = [weight.detach() for weight in weights.values()]
        buffer_copies = dict(zip(self._buffers(block), buffers, strict=True))
        with self._slots[block.index].holding({**weights, **buffer_copies}):
            held.exports = self._run(block, flight, held.inputs)[0]

    def _run(self, block: Block, flight: Flight, inputs: Mapping[str, Any]) -> tuple[Values, Any]:
        """Run a block under autocast, with the random draws of the batch's own step."""
        with casting(block.device, self.autocast), self.net.engine.seeded(block, flight.step):
            return run_graph(self._graph(block, flight), inputs)

    def _forward_last(self, batch: Batch, flight: Flight, values: Values) -> tuple[Tensor, Any, Held]:
        """Run the last block on a new batch; return the loss with its graph, the detached output, and the inputs."""
        last = self.net.blocks[-1]
        held = Held(self._with_leaves(last, flight, {n: values[n] for n in self._graph(last, flight).inputs}))
        with casting(last.device, self.autocast):
            _, local = self._run(last, flight, held.inputs)
            loss = self.net.engine.local_loss(last, local, batch.target_on(last.device), batch.inputs)
        return loss, map_tensors(Tensor.detach, local), held

    def _with_leaves(self, block: Block, flight: Flight, inputs: Values) -> Values:
        """Return a block's inputs with leaves in the place of those for which earlier blocks need a gradient."""
        made_by = self._made_by[flight.training]
        return {
            name: value.detach().requires_grad_() if made_by.get(name, block.index) < block.index else value
            for name, value in inputs.items()
        }

    def _buffers(self, block: Block) -> list[Tensor]:
        return list(self._graphs[True][block.index].module.buffers())

    def _graph(self, block: Block, flight: Flight) -> BlockGraph:
        return self._graphs[flight.training][block.index]

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _delayed_step(self, block: Block, updates: bool) -> None:
        """Run backward for the batch whose gradient has arrived at a block, and with `updates` step the block."""
        delay = len(self.net.blocks) - 1 - block.index
        if len(self._flights) <= delay:
            return
        flight = self._flights[-1 - delay]
        held, flight.held[block.index] = flight.held[block.index], None
        gradients = {n: flight.gradients.pop(n) for n in self._graph(block, flight).exports if n in flight.gradients}
        if held is not None and gradients:
            if self.weights == "current":
                self._run_again(block, flight, held)
            roots = {name: held.exports[name] for name in gradients if held.exports[name].requires_grad}
            scaler = self.scaler(block.index)
            with no_autocast(block.device):
                root_gradients = [scaled(gradients[name], root, scaler) for name, root in roots.items()]
                if roots:
                    torch.autograd.backward(list(roots.values()), root_gradients)
            self._pass_down(block, flight, held)
        if updates:
            self.step_block(block.index, ())

    def _run_again(self, block: Block, flight: Flight, held: Held) -> None:
        """Run a block on the inputs that it kept; the copies of buffers that this run updates are discarded."""
        held.inputs = self._with_leaves(block, flight, held.inputs)
        buffer_copies: dict[Tensor, Tensor] = {buffer: buffer.clone() for buffer in self._buffers(block)}
        with self._slots[block.index].holding(buffer_copies):
            held.exports = self._run(block, flight, held.inputs)[0]

    def _pass_down(self, block: Block, flight: Flight, held: Held) -> None:
        """Add the gradients of a block's inputs, unscaled, to those that wait for earlier blocks."""
        for name, leaf in held.inputs.items():
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                gradient = unscaled(leaf.grad, self.scaler(block.index))
                waiting = flight.gradients.get(name)
                flight.gradients[name] = gradient if waiting is None else waiting.to(gradient.device) + gradient
                leaf.grad = None

    # ---- state ------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the settings that a saved state depends on."""
        return {**super().options(), "weights": self.weights}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped, what blocks keep of earlier batches included."""
        return {**super().state_dict(), "flights": [flight.state_dict() for flight in self._flights]}

    def check_state(self, state: Any) -> None:
        """Check that a state belongs to this schedule; nothing is loaded.

        Raises:
            CheckpointError: it belongs to another schedule, plan or optimizer, or is damaged.
        """
        super().check_state(state)
        flights = state["flights"]
        require(isinstance(flights, list) and len(flights) <= len(self.net.blocks), "it has no list of batches")
        for flight in flights:
            check_flight(flight, len(self.net.blocks), state["steps"])
            for block, held in zip(self.net.blocks, flight["held"], strict=True):
                if held is not None:
                    names = self._graphs[flight["training"]][block.index].inputs
                    stashed = self.weights == "stashed" and block is not self.net.blocks[-1]
                    ours = self.trained_parameters(block), self._graphs[True][block.index].module
                    check_held(held, block.index, names, stashed=ours if stashed else None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; see :meth:`Schedule.load_state_dict`. The graphs of earlier batches are made again."""
        super().load_state_dict(state)
        self._flights.clear()
        for saved in state["flights"]:
            flight = Flight.from_state(saved, [block.device for block in self.net.blocks])
            self._flights.append(flight)
            for block in self.net.blocks[:-1] if self.weights == "stashed" else ():
                if (held := flight.held[block.index]) is not None:
                    weights = copies(self.trained_parameters(block), held.weights)
                    self._run_stashed(block, flight, held, weights, [buffer.clone() for buffer in held.buffers])
