"""The decoupled net: the user's model as K blocks that train without waiting for each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.host import rehost
from sedona_fx.data.args import Args
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.modules import device_of, direct_children
from sedona_fx.net.accident import Accident
from sedona_fx.net.follow import Follower
from sedona_fx.net.inference import Inference
from sedona_fx.net.parallel import OneProcess, require_unwrapped
from sedona_fx.net.parts import NetParts
from sedona_fx.net.placing import block_devices, place, redirect, relink
from sedona_fx.net.precision_proof import PrecisionProof
from sedona_fx.net.signature import Signature, method_like
from sedona_fx.net.trial import Trial
from sedona_fx.net.variants import Variants
from sedona_fx.passes import strip
from sedona_fx.plan_values import Capture
from sedona_fx.report.text import net_report
from sedona_fx.rng import turn
from sedona_fx.runtime.block import Block, StepResult, users_of
from sedona_fx.runtime.engine import Engine, OnBlock
from sedona_fx.runtime.options import Batch, StepOptions


class Net(OneProcess, Inference):
    """A decoupled net. Made by :func:`sedona_fx.decouple` or :func:`sedona_fx.load`.

    ``net(x)`` takes the arguments of the model and returns what the model returns; it runs no head. The net owns the
    only copy of the model's parameters (``net.model``) and the heads (``net.heads``), and ``net.parameters()`` yields
    those of both. What is public is for users and for authors of schedules:

    - to run it: ``net(...)`` or :meth:`call`; to train it in a loop of your own: :meth:`backward`, or :meth:`losses`;
    - to get something out of it: ``print(net)``, :meth:`save`, :meth:`load_weights`, :meth:`original_state_dict`,
      :meth:`to_onnx`, :meth:`inference_module`, :meth:`early_exit`, :meth:`ensemble`;
    - to look at it: `plan`, `costs`, `blocks`, `graph_module`, :meth:`lowered`, `capture`, :meth:`shared_parameters`;
    - to write a schedule: :meth:`batch` (checks the arguments of a step), `blocks`, `engine`, `variants`, `steps`,
      `example`; :meth:`bind` gives the inputs alone.

    Attributes:
        model: the net's copy of the user's model. Its modules are the ones that all graphs run.
        heads: index of the block, as text -> its auxiliary head.
        plan: everything that was decided.
        costs: FLOPs, parameters and activation bytes of each block, its head included, for the example batch.
        blocks: the K blocks, nearest the input first, each with its graphs, its head and its device.
        steps: training steps taken. With the seed it determines the random draws of every block; a schedule adds 1 at
            the end of each step.
        engine: runs the blocks: takes their local losses, walks back inside of a block, passes activations on without
            their graph, and protects from losses that are not finite (``engine.guard``).
        variants: the blocks in other forms: without heads, split in two, or with the outputs of their base layers.
        example: the batch that the model was traced with, every input under its argument name.
    """

    def __init__(self, parts: NetParts) -> None:
        super().__init__()
        plan, model = parts.plan, parts.model
        self.model = model
        self.heads = nn.ModuleDict({str(k): head for k, head in enumerate(parts.heads) if head is not None})
        self.training = self.heads.training = model.training
        self.steps = 0
        self.plan, self.costs, self._uneven = plan, list(parts.costs), parts.uneven
        self.example = parts.analysed.example
        self._graphs = dict(parts.lowered)
        self._placeholders = [str(n.target) for n in self._graphs[True].graph.nodes if n.op == "placeholder"]
        self._signature = Signature(Trial.of(parts), plan.inputs, self._placeholders)
        self._forward = method_like(model.forward, Net._run)
        self.__signature__ = inspect.signature(self.forward)
        # Graph modules share the modules of `model`; registered as children they would appear twice in state_dict.
        devices = block_devices(plan, model)
        self.blocks = tuple(
            Block(*block_parts)
            for block_parts in zip(
                parts.blocks[True],
                parts.blocks[False],
                [*parts.heads, None],
                devices,
                [*parts.objectives, None],
                strict=True,
            )
        )
        self.engine = Engine(self.blocks, parts.analysed.output, parts.loss, plan.seed)
        analysed_graphs = {True: parts.analysed.train, False: parts.analysed.eval}
        self.variants = Variants(analysed_graphs, self.blocks, plan.cuts, device_of(model))
        self._plain = self._without_heads()
        if plan.devices is not None:
            traced_on = device_of(model)
            place(self.blocks, model)
            relink(self._all_graphs(), model)
            redirect(self._own_graphs(), devices, traced_on)
        self._follower, self._accident = self._make_follower(parts.analysed.mode_paths), Accident(plan.blocks)
        self._precision = PrecisionProof(self._signature.trial, self._plain, self._all_graphs)
        self.note_finite()

    def _make_follower(self, flags: Mapping[str, tuple[bool, bool]]) -> Follower:
        trial, graphs = self._signature.trial, (self._plain, self._graphs[False], self._all_graphs)
        root = self.plan.root if self.capture.hosted else ""
        return Follower(self, self.engine, trial, graphs, flags=flags, root=root)

    def _without_heads(self) -> dict[bool, fx.GraphModule]:
        """Return the graphs of both modes as they were traced: without heads and boundaries."""
        moves = self.plan.devices is not None
        graphs = dict.fromkeys(self._graphs.values())  # one, if the modes do not differ
        plain = {graph: direct_children(strip(graph, keep_moves=moves)) for graph in graphs}
        return {mode: plain[graph] for mode, graph in self._graphs.items()}

    # ---- run --------------------------------------------------------------------------------------------------------

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The method that returns exactly what the model returns, in the net's mode; its signature is the model's."""
        return MethodType(self._forward, self)

    def call(self, inputs: Any, *, backprop: bool = False) -> Any:
        """Return ``net(...)`` for inputs as data loaders give them: a tuple, a mapping, or the single argument.

        A backward pass through the output trains no head, and warns, unless `backprop` says that it is meant.
        """
        return self._run(Args.of(inputs), backprop)

    def _run(self, args: Args, backprop: bool = False) -> Any:
        self.check()
        self.check_precision()
        values = self.bind(args)
        # In train mode it may draw, and another thread may just compare draws of a model with those of its graph.
        with turn() if self.training and not torch.compiler.is_compiling() else nullcontext():
            if self.capture.hosted:  # the model itself runs the code before `root` once, the graph runs it twice
                output = self.model(**{name: value for name, value in values.items() if value is not None})
            else:
                graph = self._plain[self.training]
                output = graph(*[values[name] for name in self._placeholders])
        if self.training and not backprop and len(self.heads):
            self._accident.watch(output, self.model)
        return output

    def train(self, mode: bool = True) -> Net:
        """Set the mode by the model's own ``train(mode)``, with whatever it overrides; heads follow."""
        self.training = mode
        self.model.train(mode)
        self.heads.train(mode)
        return self

    # ---- train ------------------------------------------------------------------------------------------------------

    def backward(
        self, x: Any, y: Any, scaler: Any = None, weight: float = 1.0, *, on_block: OnBlock | None = None
    ) -> StepResult:
        """Fill ``.grad`` block by block (forward, local loss, backward, free), in place of ``loss.backward()``.

        Args:
            x: inputs: a tuple of positional arguments, a mapping of keyword arguments, or else the single argument.
            y: target, passed to the loss.
            scaler: a ``torch.amp.GradScaler`` that scales the losses; the caller calls ``scaler.step(optimizer)``.
            weight: factor of the losses. To accumulate gradients, 1 / number of micro-batches.
            on_block: called with the index of a block as soon as its gradients are complete and its loss is known to be
                finite.

        Returns:
            The K local losses (without `weight`) and the output, detached. Inside ``torch.autocast`` the forward pass
            runs under it, and the backward pass does not.

        Raises:
            NonFiniteLossError: a loss is not finite; with block and step. It is raised before the method returns, so no
                optimizer has stepped on it. The buffers of all blocks (with `on_block`: of that block) are as before.
                Gradients may be incomplete: call ``zero_grad`` before the next batch.
            NonFiniteGradientError: the same for a gradient, with what earlier calls have added to it. With an enabled
                `scaler` it is not raised: ``scaler.step`` skips the step.
        """
        self.check_precision()
        scalers = [scaler] * len(self.blocks) if scaler is not None else None
        result = self.engine.backward(self.batch(x, y), StepOptions(weight=weight, scalers=scalers), on_block)
        self.engine.guard.release()
        self.steps += 1
        return result

    def losses(self, x: Any, y: Any) -> list[Tensor]:
        """Return the K local losses of a batch with their graphs; no gradient crosses between blocks."""
        self.check_precision()
        return self.engine.local_losses(self.batch(x, y))

    def batch(self, x: Any, y: Any) -> Batch:
        """Return a batch as the engine takes it, with the number of this step.

        Raises:
            DataError: the net was traced with other arguments.
            ScheduleError: as for :meth:`check`.
            ParallelError: ``net.model`` is in a wrapper that would not train the net.
        """
        self.check()
        require_unwrapped(self.model)
        return Batch(self.bind(Args.of(x)), y, self.steps, self.training)

    def bind(self, args: Args) -> dict[str, Any]:
        """Return the net's inputs by argument name.

        Raises:
            DataError: the net was traced with other arguments.
        """
        return self._signature.bind(args, self.blocks[0].device if self.plan.devices is None else None)

    def check(self) -> int:
        """Take over into the graphs what was replaced in ``net.model`` and ``net.heads``; every call and step does it.

        Returns:
            A number that is another one whenever something was taken over.

        Raises:
            ScheduleError: a module is in a mode that the graph was not made for, or something was replaced that the
                graphs cannot follow.
        """
        version = self._follower.check(self.training)
        self._precision.at(version)
        self.engine.at(version)
        return version

    def check_precision(self, autocast: torch.dtype | None = None) -> None:
        """Prove captured graphs in a precision that they have not run in yet; every call and step does it.

        Args:
            autocast: the dtype that a schedule casts to. None: as the caller's autocast state has it.

        Raises:
            ScheduleError: they do not compute there what the model computes.
        """
        self._precision.check(self.training, autocast)

    # ---- look -------------------------------------------------------------------------------------------------------

    @property
    def capture(self) -> Capture:  # type: ignore[override]
        """How the model became these graphs."""
        return self._signature.capture

    @property
    def graph_module(self) -> fx.GraphModule:
        """The LOWERED train graph: the model with its heads; it returns ``(local output, ..., output)``."""
        return self._graphs[True]

    def lowered(self, *, training: bool) -> fx.GraphModule:
        """Return the LOWERED graph of a mode."""
        return self._graphs[training]

    def shared_parameters(self) -> dict[str, list[int]]:
        """Return name -> blocks for the parameters that several blocks use; the last of them steps the parameter."""
        users = users_of(block.base_parameters() for block in self.blocks)
        return {name: users[p] for name, p in self.model.named_parameters() if len(users.get(p, ())) > 1}

    def __repr__(self) -> str:
        devices = [block.device for block in self.blocks]
        return net_report(self.plan, self.costs, devices, self.shared_parameters(), self._uneven)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def __copy__(self) -> Net:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        self._follower.follow()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {k: v for k, v in vars(self).items() if k not in ("_follower", "_precision")}
        vars(twin).update(deep_copy(own, memo))
        rehost(twin._all_graphs(), twin.model)
        twin._follower = twin._make_follower(self._follower.flags)
        twin._precision = PrecisionProof(twin._signature.trial, twin._plain, twin._all_graphs, like=self._precision)
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> Net:
        """Move or convert all tensors, as ``net.to(...)`` asks, and let every graph read the tensors that are new."""
        self._follower.follow()
        before = self.blocks[0].device
        super()._apply(fn, recurse)
        for block, device in zip(self.blocks, block_devices(self.plan, self.model), strict=True):
            block.device = device
        relink(self._all_graphs(), self.model, fn)
        if self.blocks[0].device != before:
            devices = [block.device for block in self.blocks]
            redirect([*self._own_graphs(), *self.variants.graphs()], devices, before)
            self.variants.traced_on = devices[0]
        self._follower.take()
        self._precision.converted()
        return self

    def _own_graphs(self) -> list[fx.GraphModule]:
        blocks = [m for block in self.blocks for m in (block.module, block.eval_module)]
        return [*blocks, *self._plain.values(), *self._graphs.values()]

    def _all_graphs(self) -> list[fx.GraphModule]:
        return [*self._own_graphs(), *self.variants.graphs()]
