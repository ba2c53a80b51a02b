"""BackLink: the last base layers of every block are also trained by the next block's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import ScheduleError
from sedona_fx.ir.graph import BlockGraph
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.net.net import Net
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import require_grad_mode
from sedona_fx.runtime.guard import Snapshot
from sedona_fx.runtime.options import Batch, StepOptions
from sedona_fx.runtime.precision import casting, no_autocast, scaled, unscaled
from sedona_fx.runtime.run import Values, detached, hand_on, last_readers, run_graph
from sedona_fx.train.schedules.headed import Headed
from sedona_fx.train.schedules.optimizers import OptimizerFactory


@dataclass
class Link:
    """What is kept of a block until the gradient of the next block's loss has passed through its tail.

    Attributes:
        block: the block.
        exports: the exports of its tail that a gradient can enter at, with their graph.
        parameters: the trainable parameters of the tail.
        snapshot: restores the block's buffers if its loss was not finite.
    """

    block: Block
    exports: dict[str, Tensor]
    parameters: list[nn.Parameter]
    snapshot: Snapshot


class BackLink(Headed):
    """Local losses with a backward link into the previous block (Guo, Fouda, Eltawil, Salama 2022).

    No code is public; this is our reading of the abstracts. The last `reach` base layers of block i are its tail, the
    layers before them its body. With local losses l_i and h_i the output of block i, the gradients are

        d l_i / d h_i + d l_(i+1) / d h_i        at the end of the tail
        that of l_i alone                        from the tail into the body

    so errors of block i+2 never reach block i. Where more than one activation leaves the tail, the link goes through
    all of them. ``reach=0`` is :class:`~sedona_fx.train.Greedy`, bit for bit.

    The graph of a tail lives until the next block's backward pass is done: for blocks of n equal base layers,
    activations take about (n + reach)/n of Greedy's bytes, and a little more, since the first backward pass through a
    tail has to retain the graph and so frees nothing as it goes.

    Args:
        net: a net with heads.
        optimizer: called once per block.
        reach: number of base layers in a tail, as ``net.plan.base_layers`` counts them; at most all of each block.
        options: see :class:`~sedona_fx.train.schedules.headed.Headed`.

    Raises:
        ScheduleError: a block has fewer base layers than `reach`.
    """

    def __init__(self, net: Net, optimizer: OptimizerFactory, *, reach: int = 1, **options: Any) -> None:
        if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:
            raise ScheduleError(f"reach={reach!r} is no number of base layers: give 0 or more.")
        self.reach = reach
        super().__init__(net, optimizer, **options)
        # For each mode and block: body and tail, or the whole block alone, which is its tail then.
        self._parts: Mapping[bool, list[list[BlockGraph]]]
        if reach and len(net.blocks) > 1:
            self._parts = net.variants.segments(reach, shown=self.layer_graphs is not None)
        else:
            graphs = self.layer_graphs or {mode: [block.graph(mode) for block in net.blocks] for mode in (True, False)}
            self._parts = {mode: [[graph] for graph in graphs[mode]] for mode in (True, False)}
        self._last_reader = {mode: last_readers(parts) for mode, parts in self._parts.items()}
        if reach:  # the loss of the next block contributes to what a block's optimizer steps
            self.contributors = [
                {other for block in blocks for other in (block, block + 1) if other < len(net.blocks)}
                for blocks in self.contributors
            ]

    def options(self) -> dict[str, Any]:
        """Return the settings that a saved state depends on."""
        return {**super().options(), "reach": self.reach}

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Train every block on one batch; return the local losses and the output, both from before the update."""
        net, engine, sync = self.net, self.net.engine, self.check == "sync"
        with self.accumulation_window() as updates:
            require_grad_mode("BackLink")
            engine.guard.raise_pending()
            batch, options = net.batch(inputs, target), self.step_options()
            values, losses, local = dict(batch.inputs), list[Tensor](), None
            link: Link | None = None
            with engine.guard.protecting(self.buffers_of(*net.blocks)) if sync else nullcontext() as snapshot:
                for block in net.blocks:
                    previous = link
                    loss, exports, local, link = self._local_step(block, batch, values, options, previous)
                    losses.append(loss)
                    hand_on(values, exports, block.index, self._last_reader[batch.training])
                    complete = [] if previous is None else [previous.block.index]
                    complete += [block.index] if link is None else []
                    del previous  # frees the graph of its tail before optimizers step
                    for index in complete if updates and not sync else ():
                        self.step_block(index)
                if snapshot is not None:
                    engine.guard.raise_pending()
                    engine.guard.keep(snapshot, range(len(net.blocks)))
            if updates and sync:
                self.update_all(wait=True)
                self.zero_grad()
            net.steps += 1
        return StepResult(losses, local)

    def _local_step(
        self, block: Block, batch: Batch, values: Mapping[str, Any], options: StepOptions, previous: Link | None
    ) -> tuple[Tensor, Values, Any, Link | None]:
        """Do forward and backward of one block, and the backward pass of its loss through the previous block's tail.

        Returns:
            The local loss, the exports and the local output, all detached; and the block's own link, or None.
        """
        engine, independent = self.net.engine, self.check == "async"
        *body, tail = self._parts[batch.training][block.index]
        inputs = dict(values)
        entry_leaves = _replace_by_leaves(inputs, previous.exports) if previous is not None else {}
        scaler = options.scaler(block)
        linked = self.reach > 0 and block is not self.net.blocks[-1]
        with engine.guard.protecting(self.buffers_of(block) if independent else []) as snapshot:
            with casting(block.device, options.autocast):
                with engine.seeded(block, batch.step):
                    body_exports: Values = run_graph(body[0], inputs)[0] if body else {}
                    tail_inputs = dict(body_exports)
                    tail_leaves = _replace_by_leaves(tail_inputs, body_exports)
                    tail_exports, local = run_graph(tail, {**inputs, **tail_inputs})
                loss = total = engine.local_loss(block, local, batch.target_on(block.device), batch.inputs)
                if options.block_loss is not None:
                    total = options.block_loss(block, batch, inputs, {**body_exports, **tail_exports}, loss)
            engine.guard.check(block.index, batch.step, total, defer=options.defer or not independent)
            engine.loss_backward(block, total, scaler, options.weight, retain_graph=linked)
            with no_autocast(block.device):
                _backward([body_exports[name] for name in tail_leaves], [leaf.grad for leaf in tail_leaves.values()])
            if not linked:
                engine.guard.settle(block.index, snapshot)
            if independent:
                engine.guard.keep(snapshot, [block.index])
        if previous is not None:
            gradients = {n: unscaled(leaf.grad, scaler) for n, leaf in entry_leaves.items() if leaf.grad is not None}
            self._link_backward(previous, gradients, options)
        link = None
        if linked:
            parameters = [p for p in tail.module.parameters() if p.requires_grad]
            link = Link(block, _differentiable_exports(tail, tail_exports), parameters, snapshot)
        exports = detached({**body_exports, **tail_exports})
        return loss.detach(), exports, map_tensors(Tensor.detach, local), link

    def _link_backward(self, link: Link, gradients: Mapping[str, Tensor], options: StepOptions) -> None:
        """Add the gradients of the next block's loss to the parameters of a tail.

        Args:
            link: the block and its tail.
            gradients: with respect to the exports of the tail, by name, unscaled.
            options: give the scaler of the link's block: it need not have the scale of the next block.
        """
        scaler = options.scaler(link.block)
        roots = [link.exports[name] for name in gradients]
        with no_autocast(link.block.device):
            root_gradients = [scaled(gradients[n], root, scaler) for n, root in zip(gradients, roots, strict=True)]
            _backward(roots, root_gradients, link.parameters)
        self.net.engine.guard.settle(link.block.index, link.snapshot)


def _differentiable_exports(graph: BlockGraph, exports: Values) -> dict[str, Tensor]:
    """Return the exports of a graph that a gradient can enter at."""
    return {name: exports[name] for name in graph.live_exports if exports[name].requires_grad}


def _replace_by_leaves(inputs: Values, exports: Mapping[str, Any]) -> dict[str, Tensor]:
    """Replace those `inputs` that are `exports` with a graph by leaves, in place; return the leaves by name.

    The backward pass then stops at the leaves, with the gradients in their ``.grad``.
    """
    leaves = {}
    for name, value in exports.items():
        if name in inputs and isinstance(value, Tensor) and value.requires_grad:
            leaves[name] = inputs[name] = value.detach().requires_grad_()
    return leaves


def _backward(
    roots: Sequence[Tensor], gradients: Sequence[Tensor | None], parameters: Sequence[Tensor] | None = None
) -> None:
    """Run backward from those roots that have a gradient; with `parameters`, into these alone."""
    pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
    if pairs and (parameters is None or parameters):
        torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs], inputs=parameters)
