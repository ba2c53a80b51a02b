"""What ``decouple`` returns: the user's model as K blocks that train without waiting for each other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.host import rehost
from sedona_fx.data.args import Args
from sedona_fx.errors import ExportError, ScheduleError
from sedona_fx.export.onnx import to_onnx
from sedona_fx.ir.modules import device_of, direct_children, share_copy
from sedona_fx.net.exits import EarlyExit, ensemble
from sedona_fx.net.parts import NetParts
from sedona_fx.net.placing import place, redirect, relink
from sedona_fx.net.signature import Signature
from sedona_fx.net.variants import Variants
from sedona_fx.net.weights import load_weights, save_weights
from sedona_fx.passes import strip
from sedona_fx.plan import Capture, Plan
from sedona_fx.report.text import net_report
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import Batch, Engine, OnBlock, StepOptions


class Net(nn.Module):
    """A decoupled net. Made by :func:`sedona_fx.decouple` or :func:`sedona_fx.load`.

    ``net(x)`` has the model's own signature and gives the model's own result; it runs no head. The net owns the one
    copy of the model's parameters (``net.model``) and the heads (``net.heads``); ``net.parameters()`` gives both.

    Attributes:
        plan: everything that was decided.
        blocks: the K blocks.
        graph_module: the LOWERED train graph; it returns ``(local output, ..., output)``.
        steps: training steps taken; with the seed it decides the draws of every block.
    """

    def __init__(self, parts: NetParts) -> None:
        super().__init__()
        plan, model = parts.plan, parts.model
        self.model = model
        self.heads = nn.ModuleDict({str(k): head for k, head in enumerate(parts.heads) if head is not None})
        self.training = self.heads.training = model.training
        self.steps = 0
        self.plan, self.costs = plan, list(parts.costs)
        self._graphs, self._example = dict(parts.lowered), parts.analysed.example
        # Modules whose own code depends on their training flag: the graph holds for these flags alone.
        self._flagged = [(path, model.get_submodule(path), flags) for path, flags in parts.analysed.mode_paths.items()]
        placeholders = [str(node.target) for node in self._graphs[True].graph.nodes if node.op == "placeholder"]
        self._signature = Signature(model.forward, plan.inputs, placeholders, parts.analysed.capture)
        # Graph modules share the modules of `model`; registered as children they would appear twice in state_dict.
        devices = _devices(plan, model)
        self._blocks = tuple(
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
        self.engine = Engine(self._blocks, parts.analysed.output, parts.loss, plan.seed)
        analysed_graphs = {True: parts.analysed.train, False: parts.analysed.eval}
        self.variants = Variants(analysed_graphs, self._blocks, plan.cuts, device_of(model))
        self._plain = self._without_heads()
        if plan.devices is not None:
            traced_on = device_of(model)
            place(self._blocks, model)
            relink(self._all_graphs(), model)
            redirect(self._own_graphs(), devices, traced_on)

    def _without_heads(self) -> dict[bool, fx.GraphModule]:
        """Return the graphs of both modes as the user's model has them: no heads, no boundaries."""
        moves = self.plan.devices is not None
        plain = {True: direct_children(strip(self._graphs[True], keep_moves=moves))}
        same = self._graphs[False] is self._graphs[True]
        plain[False] = plain[True] if same else direct_children(strip(self._graphs[False], keep_moves=moves))
        return plain

    # ---- the model's own face -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the model returns for these arguments, in the net's mode."""
        return self._run(Args(*args, **kwargs))

    def call(self, inputs: Any) -> Any:
        """Like ``net(...)``, for inputs as data loaders give them (a tuple, a mapping, or one argument)."""
        return self._run(Args.of(inputs))

    def _run(self, args: Args) -> Any:
        self._check_modes()
        values = self.bind(args)
        if self.capture.hosted:  # the host's own code is at hand, and runs its way to `root` once
            return self.model(**{name: value for name, value in values.items() if value is not None})
        graph = self._plain[self.training]
        return graph(*[values[str(n.target)] for n in graph.graph.nodes if n.op == "placeholder"])

    def train(self, mode: bool = True) -> Net:
        """Set the mode as the user's own ``model.train(mode)`` does, overrides included; heads follow."""
        self.training = mode
        self.model.train(mode)
        self.heads.train(mode)
        return self

    # ---- training ---------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The K blocks, nearest the input first."""
        return self._blocks

    @property
    def graph_module(self) -> fx.GraphModule:
        """The LOWERED train graph."""
        return self._graphs[True]

    def losses(self, x: Any, y: Any) -> list[Tensor]:
        """Return the K local losses of a batch, graphs kept; gradients do not cross between blocks."""
        return self.engine.local_losses(self.batch(x, y))

    def backward(
        self, x: Any, y: Any, scaler: Any = None, weight: float = 1.0, *, on_block: OnBlock | None = None
    ) -> StepResult:
        """Fill ``.grad`` block by block: forward, local loss, backward, free. The drop-in for ``loss.backward()``.

        Args:
            x: inputs (a tuple is positional, a mapping is keywords, anything else is one argument).
            y: target, handed to the loss.
            scaler: a ``torch.amp.GradScaler``; the losses are scaled, ``scaler.step(optimizer)`` stays with the caller.
            weight: factor of the losses, for accumulation: ``1 / number of micro-batches``.
            on_block: called with a block's index as soon as its gradients are complete and its loss is known to be
                finite.

        Returns:
            The K local losses (without `weight`) and the output, detached. Inside ``torch.autocast``, forward runs
            under it and backward outside of it.

        Raises:
            NonFiniteLossError: naming block and step, before it returns: no optimizer has stepped then, and the
                buffers of all blocks (with `on_block`, of the failing one) are as before. Gradients may be half there:
                ``zero_grad`` before the next batch.
        """
        scalers = [scaler] * len(self._blocks) if scaler is not None else None
        result = self.engine.backward(self.batch(x, y), StepOptions(weight=weight, scalers=scalers), on_block)
        self.steps += 1
        return result

    @property
    def capture(self) -> Capture:
        """How the model became these graphs."""
        return self._signature.capture

    @property
    def example(self) -> Args:
        """The batch that the net was traced with."""
        return self._example

    def lowered(self, *, training: bool) -> fx.GraphModule:
        """Return the LOWERED graph of a mode."""
        return self._graphs[training]

    def bind(self, args: Args) -> dict[str, Any]:
        """Return the net's inputs by argument name.

        Raises:
            DataError: they are not what the net was traced with.
        """
        return self._signature.bind(args, self._blocks[0].device if self.plan.devices is None else None)

    def batch(self, x: Any, y: Any) -> Batch:
        """Return a batch as the engine takes it, after a look at its arguments and at the modes of the modules."""
        self._check_modes()
        return Batch(self.bind(Args.of(x)), y, self.steps, self.training)

    # ---- getting things out -----------------------------------------------------------------------------------------

    def inference_module(self) -> fx.GraphModule:
        """Return the eval graph without heads and boundaries, in eval mode; it shares this net's tensors."""
        return direct_children(share_copy(strip(self._graphs[False]))).eval()

    def early_exit(self, threshold: float) -> EarlyExit:
        """Return a module that stops at the first head that is sure: it gives the output, and the blocks left at."""
        return EarlyExit(
            self._blocks,
            threshold,
            key=self.engine.output.key,
            bind=self.bind,
            capture=self.capture,
            example=self._example,
        )

    def ensemble(self, n: int) -> fx.GraphModule:
        """Return a graph of the last `n` heads' summed log-softmax, the model's own output one of them."""
        return ensemble(self._graphs[False], self._blocks, self.engine.output.key, n)

    def original_state_dict(self) -> dict[str, Any]:
        """Return the state of the user's model; loads with ``strict=True`` into a fresh copy of it."""
        return self.model.state_dict()

    def to_onnx(self, path: str | Path) -> Path:
        """Write the inference graph with a dynamic batch and check it against ONNX Runtime."""
        if self.capture.hosted:
            raise ExportError(
                f"the code around root={self.plan.root!r} runs as Python and cannot be exported: export the sub-module, "
                f"net.model.get_submodule({self.plan.root!r}), by itself."
            )
        return to_onnx(
            self.inference_module(), self._example, path, name=self.plan.model, free_batch=self.capture.free_batch
        )

    def save(self, folder: str | Path) -> None:
        """Write ``plan.json`` and ``weights.pt`` (model and heads) into a folder; files are replaced whole."""
        self.plan.save(Path(folder) / "plan.json")
        save_weights(Path(folder) / "weights.pt", {"model": self.model, "heads": self.heads}, self.steps)

    def load_weights(self, path: str | Path) -> None:
        """Read ``weights.pt`` as :meth:`save` wrote it.

        Raises:
            CheckpointError: unreadable, or of another net; nothing is loaded then.
        """
        self.steps = load_weights(path, {"model": self.model, "heads": self.heads})

    def shared_parameters(self) -> dict[str, list[int]]:
        """Return the parameters that several blocks use, by name, each with its blocks; the last one steps it."""
        users: dict[nn.Parameter, list[int]] = {}
        for block in self._blocks:
            for parameter in block.base_parameters():
                users.setdefault(parameter, []).append(block.index)
        return {name: users[p] for name, p in self.model.named_parameters() if len(users.get(p, ())) > 1}

    def __repr__(self) -> str:
        devices = [block.device for block in self._blocks]
        return net_report(self.plan, self.costs, devices, self.shared_parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        rehost(twin._all_graphs(), twin.model)
        return twin

    # ---- below the surface ------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Net:
        """Move or convert all tensors, as ``net.to(...)`` does, and show every graph the tensors that were replaced."""
        before = self._blocks[0].device
        super()._apply(fn, recurse)
        for block, device in zip(self._blocks, _devices(self.plan, self.model), strict=True):
            block.device = device
        relink(self._all_graphs(), self.model, fn)
        if self._blocks[0].device != before:
            devices = [block.device for block in self._blocks]
            redirect([*self._own_graphs(), *self.variants.graphs()], devices, before)
            self.variants.traced_on = devices[0]
        return self

    def _own_graphs(self) -> list[fx.GraphModule]:
        blocks = [m for block in self._blocks for m in (block.module, block.eval_module)]
        return [*blocks, *self._plain.values(), *self._graphs.values()]

    def _all_graphs(self) -> list[fx.GraphModule]:
        return [*self._own_graphs(), *self.variants.graphs()]

    def _check_modes(self) -> None:
        for path, module, (in_train, in_eval) in self._flagged:
            if module.training != (in_train if self.training else in_eval):
                raise ScheduleError(
                    f"{path or type(self.model).__name__} computes differently in train and in eval mode in its own "
                    f"code, and is in {'train' if module.training else 'eval'} mode while the net is in "
                    f"{'train' if self.training else 'eval'} mode. A graph is chosen for the net at once: name this "
                    "module in leaf_modules=[...] to give it a mode of its own."
                )


def _devices(plan: Plan, model: nn.Module) -> list[torch.device]:
    if plan.devices is not None:
        return [torch.device(name) for name in plan.devices]
    return [device_of(model)] * plan.blocks
