"""What schedules with heads share: local losses, what a user adds to them, and when blocks may step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sedona_fx.errors import ScheduleError
from sedona_fx.ir.graph import TensorSpec, info, output_node
from sedona_fx.ir.outputs import pick
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.engine import Batch, How
from sedona_fx.runtime.run import Values
from sedona_fx.train.losses.base import Extra, Sight
from sedona_fx.train.schedules.base import OptimizerFactory, Schedule, described

if TYPE_CHECKING:
    from sedona_fx.net.net import Net

Check = Literal["async", "sync"]


def check_mode(check: str) -> None:
    """Raise if a schedule's ``check=`` is none."""
    if check not in ("async", "sync"):
        raise ScheduleError(f"check={check!r} is neither 'async' nor 'sync'.")


class Headed(Schedule):
    """Base of the schedules that train every block by a local loss.

    Args:
        net: a net with heads.
        optimizer: called once a block with that block's parameters, those of its head and of its extra losses included.
        extra: losses to add to the local ones, for example ``[PredSim(weight=0.5)]``.
        check: ``"async"``: each block steps as soon as its gradients are there; a loss that is not finite leaves its
            own block unharmed and is reported at the latest one step later. ``"sync"``: no block steps before all K
            losses are known to be finite; else the BatchNorm buffers of all blocks are as before, too.
        options: see :class:`Schedule`.

    Attributes:
        extras: for each block, the modules of its extra losses.
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
        net.engine.require_heads(type(self).__name__)
        check_mode(check)
        self.check, self.extra = check, list(extra)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(net.engine.seed)  # as heads are drawn; no accelerator is seeded
            self._extras = [list(self._build_extras(net, block)) for block in net.blocks]
        self.extras = nn.ModuleList(nn.ModuleList(modules) for modules in self._extras)
        self._layers = net.variants.with_layers() if any(one.needs_layers for one in self.extra) else None
        super().__init__(net, optimizer, **options)

    def block_parameters(self, block: Block) -> Iterable[nn.Parameter]:
        """Return what this schedule trains of a block: its own parameters, its head's, and its extra losses'."""
        return [*block.parameters(), *self.extras[block.index].parameters()]

    def options(self) -> dict[str, Any]:
        """Return the options that a state depends on."""
        return {**super().options(), "extra": [described(one) for one in self.extra]}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped; loads with ``weights_only=True``."""
        return {**super().state_dict(), "extras": self.extras.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state)
        self.extras.load_state_dict(state["extras"])

    def how(self) -> How:
        """Return how this schedule does local steps."""
        graphs = None
        if self._layers is not None:
            graphs = self._layers[self.net.training]
        objective = self.objective if self.extra else None
        return How(self._weight, self.scalers, self.autocast, True, objective, graphs, self.buffers_of)

    def buffers_of(self, *blocks: Block) -> list[Tensor]:
        """Return the buffers that a local step of these blocks may change, extra losses included, each once."""
        found = [b for block in blocks for b in (*block.buffers(), *self.extras[block.index].buffers())]
        return list({id(buffer): buffer for buffer in found}.values())

    def objective(self, block: Block, batch: Batch, values: Values, exports: Values, loss: Tensor) -> Tensor:
        """Return the local loss of a block plus its extra losses."""
        graph = block.graph(batch.training)
        end = exports[graph.boundary] if graph.boundary is not None else None
        total, keep, terms = loss, 1.0, list[Tensor]()
        for one, module in zip(self._extras_of(self.net, block), self._extras[block.index], strict=True):
            layers = self._show_layers(block, batch.training, values, exports) if one.needs_layers else ()
            if end is None and not layers:
                continue  # the last block, without a base layer of its own
            activation = end if end is not None else layers[-1]
            terms.append(one.weight * module(Sight(activation, layers, batch.inputs, batch.target)))
            keep *= getattr(one, "keep", 1.0)
        if keep != 1.0:
            total = keep * total
        for term in terms:
            total = total + term
        return total

    def _extras_of(self, net: Net, block: Block) -> list[Extra]:
        """Return the extra losses of a block: the last one has no boundary, only layers."""
        last = block is net.blocks[-1]
        return [one for one in self.extra if one.needs_layers or not last]

    def _show_layers(self, block: Block, training: bool, values: Values, exports: Values) -> tuple[Tensor, ...]:
        before = self.net.blocks[block.index - 1].graph(training).boundary if block.index else None
        names = self.net.variants.layer_names(block.index, training)
        entering = [values[before]] if before in values else []
        return tuple(v for v in [*entering, *(exports[name] for name in names)] if isinstance(v, Tensor))

    def _build_extras(self, net: Net, block: Block) -> Iterable[nn.Module]:
        """Make a block's extra losses for the shapes of the example batch; nothing that large is allocated."""

        def like(spec: TensorSpec) -> Tensor:
            dtype = tensor.dtype if spec.dtype.is_floating_point else spec.dtype
            return torch.zeros((), dtype=dtype, device=block.device).expand(spec.shape)

        tensor = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(()))
        graph = block.graph(True)
        given = {str(n.target): info(n).value for n in net.graph_module.graph.nodes if n.op == "placeholder"}
        inputs = {name: like(value) if isinstance(value, TensorSpec) else value for name, value in given.items()}
        returned: Any = output_node(net.graph_module.graph).args[0]
        output = fx.map_arg(returned[-1], lambda n: info(n).value)
        primary = pick(output, net.engine.output.key)
        for one in self._extras_of(net, block):
            end = next((n for n in graph.module.graph.nodes if info(n).site == graph.boundary), None)
            activation = like(info(end).value) if end is not None else torch.empty(())
            yield one.build(activation, inputs, primary.shape[1] if len(primary.shape) > 1 else 1)
