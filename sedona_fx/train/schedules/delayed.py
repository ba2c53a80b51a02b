"""Delayed gradients: DDG and Features Replay."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sedona_fx.data.sources import to_device
from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import Batch, require_grad_mode
from sedona_fx.runtime.precision import casting, no_autocast, scaled, unscaled
from sedona_fx.runtime.run import Values, hand_on, last_readers, run_graph
from sedona_fx.train.buffers.in_flight import Flight, Held
from sedona_fx.train.buffers.weight_stash import Slots, copies
from sedona_fx.train.schedules.base import OptimizerFactory, Schedule
from sedona_fx.train.schedules.headed import Check, check_mode

if TYPE_CHECKING:
    from sedona_fx.net.net import Net

Weights = Literal["stashed", "current"]


class Delayed(Schedule):
    """Delayed gradients: no block waits for those above it, and no heads are needed.

    With K blocks, k = 0 nearest the input: at step t every block runs forward on batch t, and block k < K walks back
    the batch of step s = t - (K-1-k) with the gradient that block k+1 made of it one step before. While s < 0, block k
    does not step. The loss is the model's own.

    ``weights="stashed"``: DDG, Decoupled Parallel Backpropagation (Huo, Gu, Yang, Huang 2018, Algorithm 1, eq. 10)::

        w_k(t+1) = w_k(t) - lr * grad_k f_batch(s) (w(s))

    at the *old* weights: each batch runs on a copy of its weights, and its graph lives until it is walked back, at
    most K-k of them at block k. (The paper's released code walks old activations through new weights: a third
    gradient.)

    ``weights="current"``: Features Replay (Huo, Gu, Huang 2018, Algorithm 1). Only the block's input is kept; it runs
    again with the *current* weights w_k(t), with the draws of its first run, and without a second update of BatchNorm's
    running statistics. One graph is alive at a time.

    A parameter shared by several blocks has one version in ``"current"``, gets the sum of their (differently late)
    gradients, and is stepped once; with ``"stashed"`` it is refused. Under float16 autocast, gradients cross between
    blocks in true units, in float32.

    Args:
        net: with or without heads; heads neither run nor get gradients nor are stepped.
        optimizer: called once a block with the parameters of the user's model in that block.
        weights: see above.
        check: ``"async"``: blocks step without waiting for the loss of this batch, which has no part in their step yet;
            if it is not finite, the last block and all buffers are unharmed and the batch is abandoned. ``"sync"``: no
            block steps, either.
        options: see :class:`~sedona_fx.train.schedules.base.Schedule`.

    Raises:
        ScheduleError: a parameter shared by blocks, with ``"stashed"``.
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
            self._refuse_shared("Delayed(weights='stashed')", "each block would stash it at another age")
        self._graphs = net.variants.headless()
        self._last_reader = {mode: last_readers([graph] for graph in graphs) for mode, graphs in self._graphs.items()}
        hosts = [net.model] if net.capture.hosted else []
        self._slots = [Slots([g[block.index].module for g in self._graphs.values()] + hosts) for block in net.blocks]
        first = next(block.index for block in net.blocks if self._trained(block))
        self._wanted = {  # live values behind something that is trained, and the blocks that make them
            mode: {name: graph.index for graph in graphs[first:] for name in graph.live_exports}
            for mode, graphs in self._graphs.items()
        }
        self._flights: deque[Flight] = deque(maxlen=len(net.blocks))

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return the parameters of the user's model in a block, without the head's."""
        return block.base_parameters()

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Run forward on one batch, walk back one batch a block; return the final loss alone, and the output."""
        net, engine, last = self.net, self.net.engine, self.net.blocks[-1]
        with self._window() as ends:
            require_grad_mode("Delayed")
            self.raise_pending()
            batch = net.batch(inputs, target)
            flight = Flight(batch.step, batch.training, [None] * len(net.blocks))
            self._flights.append(flight)
            # A loader may fill the same tensors again: what outlives this step is copied.
            values = dict(batch.inputs)
            if len(net.blocks) > 1:
                values = {name: map_tensors(torch.clone, value) for name, value in values.items()}
            wait = self.check == "sync" or self.weights == "current"
            try:
                with engine.guard.protecting(engine.buffers()) as snapshot:
                    for block in net.blocks[:-1]:
                        held, exports = self._forward(block, flight, values)
                        flight.held[block.index] = held
                        hand_on(values, exports, block.index, self._last_reader[batch.training])
                        del held, exports
                        if not wait:
                            self._turn(block, ends)
                    loss, output, held = self._final(batch, values)
                    engine.guard.check(last.index, batch.step, loss, defer=self.check == "async")
                    self._walk_back_loss(flight, loss, held)
                    engine.guard.settle(last.index, snapshot)
            except BaseException:
                if wait:  # no block has had its turn: as if the batch had never been
                    self._flights.pop()
                else:
                    flight.abandon()
                    net.steps += 1
                raise
            net.steps += 1
            for block in net.blocks[:-1] if wait else ():
                self._turn(block, ends)
            if ends:
                self._step_block(last.index, {last.index})
        return StepResult([loss.detach()], output)

    def raise_pending(self) -> None:
        """Raise for a loss of the last step that was not finite; nothing comes back of that batch then."""
        try:
            super().raise_pending()
        except NonFiniteLossError:
            self._flights[-1].abandon()
            raise

    # ---- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, block: Block, flight: Flight, values: Values) -> tuple[Held, Values]:
        """Run a block on a new batch; return what it keeps of it, and its exports."""
        read = {name: values[name] for name in self._graph(block, flight).inputs}
        if self.weights == "current":
            with torch.no_grad():
                exports = self._run(block, flight, read)[0]
            torch.clear_autocast_cache()  # the caller's region would hand the weights that it cast here out again
            return Held(read), exports
        buffers = self._buffers(block)
        held = Held(read, buffers=[buffer.clone() for buffer in buffers])
        after = [buffer.clone() for buffer in buffers]
        self._graph_of(block, flight, held, copies(self._trained(block)), after)
        with torch.no_grad():
            for buffer, value in zip(buffers, after, strict=True):
                buffer.copy_(value)
        return held, held.exports

    def _graph_of(
        self, block: Block, flight: Flight, held: Held, weights: Mapping[Tensor, Tensor], buffers: Iterable[Tensor]
    ) -> None:
        """Run a block on stashed weights, and on `buffers`, which it updates; its exports, with their graph, are held.

        Normalisation layers save the buffers that they update for backward: each graph needs its own.
        """
        held.inputs = self._with_leaves(block, flight, held.inputs)
        held.weights = [weight.detach() for weight in weights.values()]
        own = dict(zip(self._buffers(block), buffers, strict=True))
        with self._slots[block.index].holding({**weights, **own}):
            held.exports = self._run(block, flight, held.inputs)[0]

    def _run(self, block: Block, flight: Flight, read: Mapping[str, Any]) -> tuple[Values, Any]:
        with casting(block.device, self.autocast), self.net.engine.random(block, flight.step):
            return run_graph(self._graph(block, flight), read)

    def _final(self, batch: Batch, values: Values) -> tuple[Tensor, Any, Held]:
        """Run the last block; return the loss with its graph, the output, and the leaves that gradients come out at."""
        last, flight = self.net.blocks[-1], self._flights[-1]
        held = Held(self._with_leaves(last, flight, {n: values[n] for n in self._graph(last, flight).inputs}))
        with casting(last.device, self.autocast):
            _, local = self._run(last, flight, held.inputs)
            loss = self.net.engine.local_loss(last, local, batch.target, batch.inputs)
        return loss, map_tensors(Tensor.detach, local), held

    def _with_leaves(self, block: Block, flight: Flight, read: Values) -> Values:
        """Put leaves in the place of the values that earlier blocks want a gradient for."""
        wanted = self._wanted[flight.training]
        return {
            name: value.detach().requires_grad_() if wanted.get(name, block.index) < block.index else value
            for name, value in read.items()
        }

    def _buffers(self, block: Block) -> list[Tensor]:
        return list(self._graphs[True][block.index].module.buffers())

    def _graph(self, block: Block, flight: Flight) -> Any:
        return self._graphs[flight.training][block.index]

    def _trained(self, block: Block) -> list[nn.Parameter]:
        return [parameter for parameter in self.block_parameters(block) if parameter.requires_grad]

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _walk_back_loss(self, flight: Flight, loss: Tensor, held: Held) -> None:
        last = self.net.blocks[-1]
        self.net.engine.walk_back(last, loss, self._scaler(last.index), self._weight)
        self._hand_down(last, flight, held)

    def _turn(self, block: Block, ends: bool) -> None:
        """Walk back the batch whose gradient has arrived at a block, and update the block."""
        late = len(self.net.blocks) - 1 - block.index
        if len(self._flights) <= late:
            return
        flight = self._flights[-1 - late]
        held, flight.held[block.index] = flight.held[block.index], None
        gradients = {n: flight.gradients.pop(n) for n in self._graph(block, flight).exports if n in flight.gradients}
        if held is not None and gradients:
            if self.weights == "current":
                self._run_again(block, held, flight)
            roots = {name: held.exports[name] for name in gradients if held.exports[name].requires_grad}
            with no_autocast(block.device):
                given = [scaled(gradients[name], root, self._scaler(block.index)) for name, root in roots.items()]
                if roots:
                    torch.autograd.backward(list(roots.values()), given)
            self._hand_down(block, flight, held)
        if ends:
            self._step_block(block.index, ())

    def _run_again(self, block: Block, held: Held, flight: Flight) -> None:
        """Run a block on what it kept; the buffers that this run updates are thrown away with its graph."""
        held.inputs = self._with_leaves(block, flight, held.inputs)
        buffers: dict[Tensor, Tensor] = {buffer: buffer.clone() for buffer in self._buffers(block)}
        with self._slots[block.index].holding(buffers):
            held.exports = self._run(block, flight, held.inputs)[0]

    def _hand_down(self, block: Block, flight: Flight, held: Held) -> None:
        """Add the gradients of what a block read to those that wait for the blocks below, in true units."""
        for name, leaf in held.inputs.items():
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                gradient = unscaled(leaf.grad, self._scaler(block.index))
                before = flight.gradients.get(name)
                flight.gradients[name] = gradient if before is None else before.to(gradient.device) + gradient
                leaf.grad = None

    # ---- state ------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Return the options that a state depends on."""
        return {**super().options(), "weights": self.weights}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped: graphs are made again from what they were made of."""
        state = super().state_dict()

        def bare(held: Held) -> dict[str, Any]:
            inputs = {name: map_tensors(Tensor.detach, value) for name, value in held.inputs.items()}
            return {"inputs": inputs, "weights": held.weights, "buffers": held.buffers}

        state["flights"] = [
            {
                "step": flight.step,
                "training": flight.training,
                "gradients": dict(flight.gradients),
                "held": [bare(held) if held is not None else None for held in flight.held],
            }
            for flight in self._flights
        ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state)
        self._flights.clear()
        for saved in state["flights"]:
            held = [
                Held(**{**one, "inputs": to_device(one["inputs"], block.device)}) if one is not None else None
                for block, one in zip(self.net.blocks, saved["held"], strict=True)
            ]
            flight = Flight(saved["step"], saved["training"], held, dict(saved["gradients"]))
            self._flights.append(flight)
            if self.weights == "stashed":
                for block in self.net.blocks[:-1]:
                    one = held[block.index]
                    if one is not None:
                        weights = copies(self._trained(block), one.weights)
                        self._graph_of(block, flight, one, weights, [buffer.clone() for buffer in one.buffers])
