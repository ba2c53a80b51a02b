"""BackLink: every block's last base layers also hear of the next block's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import ScheduleError
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import Batch, How, require_grad_mode
from sedona_fx.runtime.guard import Snapshot
from sedona_fx.runtime.precision import casting, no_autocast, scaled, unscaled
from sedona_fx.runtime.run import Values, detached, hand_on, last_readers, run_graph
from sedona_fx.train.schedules.base import OptimizerFactory
from sedona_fx.train.schedules.headed import Headed

if TYPE_CHECKING:
    from sedona_fx.net.net import Net


@dataclass
class Link:
    """The tail of a block, waiting for the next block's loss: its exports with their graph, and its parameters."""

    block: Block
    exports: dict[str, Tensor]
    parameters: list[nn.Parameter]
    snapshot: Snapshot


class BackLink(Headed):
    """Local losses with a backward link into the block below (Guo, Fouda, Eltawil, Salama 2022).

    No code is public; this is our reading of the abstracts. The last `reach` base layers of block i are its tail. They
    follow, besides the local loss of block i, that of block i+1, which then stops:

        G at the end of the tail = d l_i / d h_i + d l_(i+1) / d h_i        G into the body = the l_i part alone

    Errors of block i+2 never reach block i. Where more than one activation leaves the tail, the link goes through all
    of them. `reach=0` is :class:`~sedona_fx.train.Greedy`, bit for bit. The graph of a tail lives until the next block
    has walked back: for blocks of n equal base layers, activations take about (n + reach)/n of Greedy's bytes, and a
    little more, since a graph that is to be walked again frees nothing on the way.

    Args:
        net: a net with heads.
        optimizer: called once a block.
        reach: base layers of a tail, as ``net.plan.base_layers`` counts them; at most all of each block.
        options: see :class:`~sedona_fx.train.schedules.headed.Headed`.

    Raises:
        ScheduleError: a block has fewer base layers than `reach`.
    """

    def __init__(self, net: Net, optimizer: OptimizerFactory, *, reach: int = 1, **options: Any) -> None:
        if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
            raise ScheduleError(f"reach={reach!r} is no number of base layers: give 0 or more.")
        self.reach = reach
        super().__init__(net, optimizer, **options)
        if reach and len(net.blocks) > 1:
            self._parts = net.variants.segments(reach, shown=self._layers is not None)
        else:
            graphs = self._layers or {mode: [block.graph(mode) for block in net.blocks] for mode in (True, False)}
            self._parts = {mode: [[graph] for graph in graphs[mode]] for mode in (True, False)}
        self._last_reader = {mode: last_readers(parts) for mode, parts in self._parts.items()}
        if reach:  # the loss of the next block has a part in what a block's optimizer steps
            self.contributors = [
                {other for block in blocks for other in (block, block + 1) if other < len(net.blocks)}
                for blocks in self.contributors
            ]

    def options(self) -> dict[str, Any]:
        """Return the options that a state depends on."""
        return {**super().options(), "reach": self.reach}

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train every block on one batch; return the local losses and the output, both from before the update."""
        net, engine, sync = self.net, self.net.engine, self.check == "sync"
        with self._window() as ends:
            require_grad_mode("BackLink")
            engine.guard.raise_pending()
            batch, how = net.batch(inputs, target), self.how()
            values, losses, local = dict(batch.inputs), list[Tensor](), None
            link: Link | None = None
            with engine.guard.protecting(self.buffers_of(*net.blocks)) if sync else nullcontext():
                for block in net.blocks:
                    below = link
                    loss, exports, local, link = self._local_step(block, batch, values, how, below)
                    losses.append(loss)
                    hand_on(values, exports, block.index, self._last_reader[batch.training])
                    done = [] if below is None else [below.block.index]
                    done += [block.index] if link is None else []
                    del below
                    for index in done if ends and not sync else ():
                        self._step_block(index)
                if sync:
                    engine.guard.raise_pending()
            for block in net.blocks if ends and sync else ():
                self._step_block(block.index)
            net.steps += 1
        return StepResult(losses, local)

    def _local_step(
        self, block: Block, batch: Batch, values: Mapping[str, Any], how: How, below: Link | None
    ) -> tuple[Tensor, Values, Any, Link | None]:
        """Run a block, walk its loss back inside it, and on into the tail below."""
        engine, alone = self.net.engine, self.check == "async"
        *body, tail = self._parts[batch.training][block.index]
        read = dict(values)
        entered = _leaves(below.exports, read) if below is not None else {}
        scaler = how.scaler(block)
        with engine.guard.protecting(self.buffers_of(block) if alone else []) as snapshot:
            with casting(block.device, how.autocast):
                with engine.random(block, batch.step):
                    shown: Values = run_graph(body[0], read)[0] if body else {}
                    handed = dict(shown)
                    crossed = _leaves(shown, handed)
                    exports, local = run_graph(tail, {**read, **handed})
                loss = total = engine.local_loss(block, local, batch.target, batch.inputs)
                if how.objective is not None:
                    total = how.objective(block, batch, read, {**shown, **exports}, loss)
            engine.guard.check(block.index, batch.step, total, defer=how.defer or not alone)
            linked = self.reach > 0 and block is not self.net.blocks[-1]
            engine.walk_back(block, total, scaler, how.weight, keep=linked)
            with no_autocast(block.device):
                _walk([shown[name] for name in crossed], [leaf.grad for leaf in crossed.values()])
            if not linked:
                engine.guard.settle(block.index, snapshot)
        if below is not None:
            theirs = how.scaler(below.block)
            gradients = {n: unscaled(leaf.grad, scaler) for n, leaf in entered.items() if leaf.grad is not None}
            roots = [below.exports[name] for name in gradients]
            with no_autocast(below.block.device):
                given = [scaled(gradients[n], root, theirs) for n, root in zip(gradients, roots, strict=True)]
                _walk(roots, given, below.parameters)
            engine.guard.settle(below.block.index, below.snapshot)
        link = None
        if linked:
            link = Link(block, _live(exports, tail), [p for p in tail.module.parameters() if p.requires_grad], snapshot)
        everything = detached({**shown, **exports})
        return loss.detach(), everything, map_tensors(Tensor.detach, local), link


def _live(exports: Values, graph: BlockGraph) -> dict[str, Tensor]:
    """Return the exports of a graph that a gradient can come back through."""
    return {name: exports[name] for name in graph.live_exports if exports[name].requires_grad}


def _leaves(given: Mapping[str, Any], read: Values) -> dict[str, Tensor]:
    """Put leaves in the place of the values in `read` that carry gradients in `given`; return the leaves."""
    leaves = {}
    for name, value in given.items():
        if name in read and isinstance(value, Tensor) and value.requires_grad:
            leaves[name] = read[name] = value.detach().requires_grad_()
    return leaves


def _walk(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor] | None = None
) -> None:
    """Walk gradients back from those roots that have one; into `parameters` alone, if given."""
    pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
    if pairs and (parameters is None or parameters):
        torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs], inputs=parameters)
