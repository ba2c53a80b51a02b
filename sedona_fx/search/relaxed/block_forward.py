"""Forward pass of one block of the relaxed net, and the segment of the autograd graph that it added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.errors import HeadError
from sedona_fx.ir.modules import holding
from sedona_fx.search.relaxed.state import RelaxedBlock, RelaxedNet, Slot, State, Tensors, named_tensors
from sedona_fx.search.relaxed.vjp import Leaf, accumulate, gradients, live_tensors, present, reachable, with_own_nodes
from sedona_fx.search.session.batches import NamedBatch

LOSS: Leaf = ("", 0)
"""Key of the last block's loss among the outputs of its segment; no value has an empty name."""


@dataclass(frozen=True)
class Segment:
    """The part of the autograd graph that one block's forward pass added: where it starts and where it ends.

    All tensors at its start are nodes of its own (:func:`~sedona_fx.search.relaxed.vjp.with_own_nodes`).

    Attributes:
        outputs: the block's live exports; of the last block, its loss as :data:`LOSS`.
        boundary: of `outputs`, what the heads read; empty for the last block.
        inputs: live exports of earlier blocks that the block read.
        weights: weights that `outputs` depend on: those of the base layer.
        head_weights: weights that the heads alone depend on.
    """

    outputs: dict[Leaf, Tensor]
    boundary: dict[Leaf, Tensor]
    inputs: dict[Leaf, Tensor]
    weights: dict[Slot, Tensor]
    head_weights: dict[Slot, Tensor]

    def pull_back(self, cotangents: dict[Leaf, Tensor], create_graph: bool) -> dict[Slot, Tensor]:
        """Take the vector-Jacobian product of the segment.

        Args:
            cotangents: of live values that cross the cut after this block. Changed in place to those of the values that
                cross the cut before it: entries of `outputs` are removed, entries of `inputs` added.
            create_graph: keep the result differentiable.

        Returns:
            Gradients of `weights`.
        """
        roots = {leaf: t for leaf, t in self.outputs.items() if leaf in cotangents}
        products = gradients(
            [*roots.values()],
            [*self.weights.values(), *self.inputs.values()],
            [cotangents.pop(leaf) for leaf in roots],
            create_graph,
        )
        accumulate(cotangents, present(self.inputs, products[len(self.weights) :]))
        return present(self.weights, products)


def run_relaxed_block(
    net: RelaxedNet,
    index: int,
    state: State,
    *,
    params: Sequence[Tensors],
    env: Mapping[str, Any],
    batch: NamedBatch,
    beta: Tensor | None,
    with_heads: bool = True,
) -> tuple[Segment, dict[str, Any], Tensor]:
    """Run one block in training mode and take its local loss.

    Args:
        net: the relaxed net.
        index: of the block, 0-based.
        state: says where shared weights are held, and has the buffers, which are updated in place.
        params: the weights to run at, laid out as `state.params`.
        env: exports of earlier blocks, by name.
        batch: the net's inputs by name, and the target.
        beta: logits of the block's heads, (M,). None for the last block.
        with_heads: whether a local loss is wanted. If not, a block other than the last runs `trunk`, or `module` where
            it has none, and a constant 0 stands for its loss.

    Returns:
        The segment that was added to the autograd graph, the block's exports by name, and the loss, 0-d.

    Raises:
        HeadError: a head uses a weight of its own base layer. The two gradients of that weight have different rates,
            and a single backward walk cannot tell them apart.
    """
    block, is_last = net.blocks[index], index == len(net.blocks) - 1
    inputs, target = batch
    read = {name: with_own_nodes(env[name]) for name in block.inputs if name in env}
    slots = state.slots(state.params, index)
    weights: dict[Slot, Tensor] = {(k, n): with_own_nodes(params[k][n]) for k, n in dict.fromkeys(slots.values())}
    tensors = {n: weights[slot] for n, slot in slots.items()} | state.used(state.buffers, index)
    skips_heads = not with_heads and not is_last
    module = block.trunk if skips_heads and block.trunk is not None else block.module
    exports, output = run_block(block, module, tensors=tensors, beta=beta, env={**inputs, **read})
    loss = torch.zeros(()) if skips_heads else net.local_loss(index, output, target)
    live_inputs = live_tensors(read)
    if is_last:
        return Segment({LOSS: loss}, {}, live_inputs, weights, {}), exports, loss
    outputs, boundary = live_tensors(exports), live_tensors({str(block.boundary): exports[str(block.boundary)]})
    of_base = reachable(outputs.values(), weights, stop=live_inputs.values())
    base_weights = {slot: t for slot, t in weights.items() if slot in of_base}
    if skips_heads:
        return Segment(outputs, boundary, live_inputs, base_weights, {}), exports, loss
    of_heads = reachable([loss], weights, stop=boundary.values())
    if of_both := of_base & of_heads:
        names = ", ".join(n for n, slot in slots.items() if slot in of_both)
        raise HeadError(
            f"block {index}: its heads depend on {names} other than through the boundary {block.boundary!r}"
        )
    head_weights = {slot: t for slot, t in weights.items() if slot not in of_base}
    return Segment(outputs, boundary, live_inputs, base_weights, head_weights), exports, loss


def run_block(
    block: RelaxedBlock, module: nn.Module, *, tensors: Tensors, beta: Tensor | None, env: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Run one block on the values of `env`.

    Args:
        block: names the inputs and exports.
        module: one of the block's modules.
        tensors: parameters and buffers to run at, by name; those that `module` lacks are left out.
        beta: logits of the heads; None: the module keeps its own.
        env: values by name.

    Returns:
        The exports by name, and the local output.
    """
    if beta is not None and block.beta is not None:
        tensors = {**tensors, block.beta: beta}
    names = named_tensors(module)
    replaced = {n: t for n, t in tensors.items() if n in names}
    with holding(module, replaced):
        values, local = module(*(env[n] for n in block.inputs))
    return dict(zip(block.exports, values, strict=True)), local
