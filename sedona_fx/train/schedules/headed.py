"""Base class of the schedules with local losses: extra losses added to them, and when blocks may step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sedona_fx.errors import ScheduleError
from sedona_fx.heads.rows import entering
from sedona_fx.ir.graph import TensorSpec, info, output_node
from sedona_fx.ir.modules import first_float_parameter
from sedona_fx.ir.outputs import pick
from sedona_fx.net.net import Net
from sedona_fx.net.weights import mismatch
from sedona_fx.net.wrapped import require_net
from sedona_fx.rng import seeded_init
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.options import Batch, StepOptions
from sedona_fx.runtime.run import Values
from sedona_fx.train.losses.base import Extra, Sight
from sedona_fx.train.schedules.base import Schedule
from sedona_fx.train.schedules.optimizers import OptimizerFactory
from sedona_fx.train.schedules.state import described, require

Check = Literal["async", "sync"]


def check_mode(check: str) -> None:
    """Check a schedule's ``check=``.

    Raises:
        ScheduleError: it is neither ``"async"`` nor ``"sync"``.
    """
    if check not in ("async", "sync"):
        raise ScheduleError(f"check={check!r} is neither 'async' nor 'sync'.")


class Headed(Schedule):
    """Base of the schedules that train every block by a local loss.

    A :meth:`step` of a subclass hands :meth:`step_options` to the net's engine: extra losses, scaling, autocast and
    accumulation are in them.

    Args:
        net: a net with heads.
        optimizer: called once per block with that block's parameters, those of its head and of its extra losses
            included.
        extra: losses to add to the local ones, for example ``[PredSim(weight=0.5)]``.
        check: ``"async"``: each block steps as soon as its gradients are complete; a loss or a gradient that is not
            finite leaves its own block unharmed and is reported at the latest one step later. ``"sync"``: no block
            steps before all K losses and the gradients of all blocks are known to be finite; if one is not, the
            BatchNorm buffers of all blocks are restored as well.
        options: see :class:`~sedona_fx.train.schedules.base.Schedule`.

    Attributes:
        extra: the extra losses, as given.
        extras: for each block, the modules of its extra losses.
        layer_graphs: for each mode (True: train), the graphs of the blocks that export the outputs of base layers as
            well; None if no extra loss looks at them.

    Raises:
        ScheduleError: a block has no head, or a setting has a value that it cannot have.
    """

    parts: ClassVar[tuple[str, ...]] = ("extras",)

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerFactory,
        *,
        extra: Sequence[Extra] = (),
        check: Check = "async",
        **options: Any,
    ) -> None:
        require_net(net, type(self).__name__)
        net.check()
        net.engine.require_heads(type(self).__name__)
        check_mode(check)
        self.check, self.extra = check, list(extra)
        with seeded_init(net.engine.seed):  # as for heads
            self._extra_modules = [list(self._build_extras(net, block)) for block in net.blocks]
        self.extras = nn.ModuleList(nn.ModuleList(modules) for modules in self._extra_modules)
        needs_layers = any(extra.needs_layers for extra in self.extra)
        self.layer_graphs = net.variants.with_layers() if needs_layers else None
        super().__init__(net, optimizer, **options)

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return a block's parameters: those of the model, of the head, and of the extra losses."""
        return [*block.parameters(), *self.extras[block.index].parameters()]

    def options(self) -> dict[str, Any]:
        """Return the settings that a saved state depends on."""
        return {**super().options(), "extra": [described(extra) for extra in self.extra]}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped, the extra losses' parameters included."""
        return {**super().state_dict(), "extras": self.extras.state_dict()}

    def check_state(self, state: Any) -> None:
        """Check that a state belongs to this schedule; nothing is loaded.

        Raises:
            CheckpointError: it belongs to another schedule, plan or optimizer, or is damaged.
        """
        super().check_state(state)
        require(isinstance(state["extras"], dict), "it has no weights of extra losses")
        difference = mismatch(self.extras, state["extras"], dtypes=True)
        require(not difference, f"of its extra losses, {difference}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; see :meth:`Schedule.load_state_dict`."""
        super().load_state_dict(state)
        self.extras.load_state_dict(state["extras"])

    def step_options(self) -> StepOptions:
        """Return how the engine does this schedule's local steps."""
        return StepOptions(
            weight=self.loss_weight,
            scalers=self.scalers,
            autocast=self.autocast,
            defer=True,
            block_loss=self.block_loss if self.extra else None,
            graphs=self.layer_graphs[self.net.training] if self.layer_graphs is not None else None,
            buffers_of=self.buffers_of,
            guard_gradients=False,  # they are checked when they are complete, by `update`
        )

    def buffers_of(self, *blocks: Block) -> list[Tensor]:
        """Return the buffers that a local step of these blocks may change, extra losses included, each once."""
        found: dict[int, Tensor] = {}
        for block in blocks:
            found.update((id(buffer), buffer) for buffer in block.buffers())
            for module in self._extra_modules[block.index]:
                found.update((id(buffer), buffer) for buffer in module.buffers())
        return list(found.values())

    def block_loss(self, block: Block, batch: Batch, values: Values, exports: Values, loss: Tensor) -> Tensor:
        """Return what a block's backward pass starts from: its local loss plus its extra losses.

        Args:
            block: the block.
            batch: the batch.
            values: what the block reads, by name.
            exports: what it exports, with its graph, by name.
            loss: its local loss, a scalar.
        """
        boundary = block.graph(batch.training).boundary
        output = exports[boundary] if boundary is not None else None
        total, keep, terms = loss, 1.0, list[Tensor]()
        for extra, module in zip(self._extras_of(self.net, block), self._extra_modules[block.index], strict=True):
            layers = self._layer_outputs(block, batch.training, values, exports) if extra.needs_layers else ()
            if output is None and not layers:
                continue  # the last block, without a base layer of its own
            activation = entering(block.head, output) if output is not None else layers[-1]
            terms.append(extra.weight * module(Sight(activation, layers, batch.inputs, batch.target)))
            keep *= getattr(extra, "keep", 1.0)
        if keep != 1.0:
            total = keep * total
        for term in terms:
            total = total + term
        return total

    def _extras_of(self, net: Net, block: Block) -> list[Extra]:
        """Return the extra losses of a block. The last block has no boundary: only those that look at layers."""
        last = block is net.blocks[-1]
        return [extra for extra in self.extra if extra.needs_layers or not last]

    def _layer_outputs(self, block: Block, training: bool, values: Values, exports: Values) -> tuple[Tensor, ...]:
        """Return the activation that enters a block and the outputs of its base layers, as far as they are tensors."""
        before = self.net.blocks[block.index - 1].graph(training).boundary if block.index else None
        names = self.net.variants.layer_names(block.index, training)
        entering = [values[before]] if before in values else []
        return tuple(v for v in [*entering, *(exports[name] for name in names)] if isinstance(v, Tensor))

    def _build_extras(self, net: Net, block: Block) -> Iterable[nn.Module]:
        """Make a block's extra losses for the shapes of the example batch.

        The examples that they get are expanded scalars, so that no memory of an activation's size is allocated.
        """

        def example(spec: TensorSpec) -> Tensor:
            dtype = parameter.dtype if spec.dtype.is_floating_point else spec.dtype
            return torch.zeros((), dtype=dtype, device=block.device).expand(spec.shape)

        first = first_float_parameter(block.module)
        parameter = first if first is not None else torch.empty(())
        graph, net_graph = block.graph(True), net.graph_module.graph
        specs = {str(n.target): info(n).value for n in net_graph.nodes if n.op == "placeholder"}
        inputs = {name: example(value) if isinstance(value, TensorSpec) else value for name, value in specs.items()}
        returned: Any = output_node(net_graph).args[0]
        output = fx.map_arg(returned[-1], lambda n: info(n).value)
        primary = pick(output, net.engine.output.key)
        classes = primary.shape[1] if len(primary.shape) > 1 else 1
        for extra in self._extras_of(net, block):
            end = next((n for n in graph.module.graph.nodes if info(n).site == graph.boundary), None)
            activation = entering(block.head, example(info(end).value)) if end is not None else torch.empty(())
            yield extra.build(activation, inputs, classes)
