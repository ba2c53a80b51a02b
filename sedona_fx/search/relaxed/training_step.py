"""The training step of the relaxed net.

SEDONA (Pyeon et al., ICLR 2021) relaxes "cut here or not" to a softmax over two logits per base layer. With l_i the
local loss of the mixed head at base layer i and p = softmax(alpha),

    Lt_B = l_B        Lt_i = p_isolate,i * l_i + p_through,i * Lt_(i+1)

base layer j follows the gradient of Lt_j, and the heads at i follow that of l_i at full rate.

No single scalar has all these gradients. An identity that scales its backward pass would give them, but its *second*
derivatives are wrong: they go back through the scaled edges of the forward graph. So the forward graph is left
unscaled, and the gradients that enter base layer i from above are combined by hand. Let h_i be its boundary, which the
heads read, and U_v = dLt_(i+1)/dv for every value v that crosses cut i. The cotangents are

    G_h_i = p_isolate,i * dl_i/dh_i + p_through,i * U_h_i
    G_v   = p_through,i * U_v        for every other v: made in base layer i too, or passing it on the way to later ones

From the last base layer to the first, each takes one vector-Jacobian product: the roots are all values that the layer
made, their cotangents are G. A value that passes the layer keeps its G as its U at the cut before it. Each product can
itself be differentiated. A weight that several base layers use gets the sum of their gradients, each of the layer's own
Lt.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sedona_fx.errors import SettingsError
from sedona_fx.search.relaxed.block_forward import LOSS, Segment, run_relaxed_block
from sedona_fx.search.relaxed.cut_record import CutRecord, GeneratorStates
from sedona_fx.search.relaxed.second_order import short_second_derivatives
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, Slot, State, Tensors
from sedona_fx.search.relaxed.vjp import Leaf, accumulate, gradients, present
from sedona_fx.search.session.batches import NamedBatch


@dataclass(frozen=True)
class RelaxedGradients:
    """Gradients and losses of one relaxed step.

    Attributes:
        grads: by block and name, laid out as `State.params`; a parameter without gradient is absent.
        losses: the local losses that were evaluated, in order, the final one last; detached, 0-d. B of them, unless
            cuts were sampled.
    """

    grads: list[Tensors]
    losses: list[Tensor]


def relaxed_gradients(
    net: RelaxedNet,
    state: State,
    logits: Logits,
    batch: NamedBatch,
    *,
    create_graph: bool,
    sampled: Mapping[int, float] | None = None,
    records: list[CutRecord] | None = None,
) -> RelaxedGradients:
    """Return the gradients of the relaxed net on one batch: base layer j gets that of Lt_j, the heads at i that of l_i.

    With `sampled`, the cuts in it alone run their heads. In every Lt_j, w l_i then stands for l_i at these cuts, and 0
    at all others. Every Lt_j is linear in the l_i, so where cut i is drawn with probability 1/w_i the gradients of the
    base layers are unbiased, at the given weights and batch. Heads that run follow their own l_i, unscaled, as in any
    step; the other heads get no gradient and keep their weights, momentum and statistics.

    Args:
        net: the relaxed net.
        state: weights to take the gradients at. Its buffers are updated in place, as in any training forward pass.
        logits: alpha and beta.
        batch: the net's inputs by name, and the target.
        create_graph: keep the gradients differentiable with respect to alpha, beta and the weights. If not, each
            layer's segment of the graph is freed as soon as it has been walked, that of its heads right after their
            forward pass.
        sampled: cut -> w, see :func:`sample_cuts`. None: all cuts, each with w = 1.
        records: one entry per cut is appended, with what the step found there.

    Raises:
        HeadError: a head uses a weight of its own base layer.
    """
    logits = logits if create_graph else logits.detached()
    rates, last = logits.alpha.softmax(1), len(net.blocks) - 1
    params = [{n: t if t.requires_grad else t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    env: dict[str, Any] = {}  # the exports of the blocks so far
    grads: dict[Slot, Tensor] = {}
    losses: list[Tensor] = []
    segments: list[tuple[Segment, dict[Leaf, Tensor]]] = []  # each with dl_i/dh_i
    with torch.enable_grad(), short_second_derivatives(net) if create_graph else nullcontext():
        for i in range(len(net.blocks)):
            if records is not None and i < last:
                records.append(CutRecord(GeneratorStates.now(logits.alpha.device)))
            with_heads = i == last or sampled is None or i in sampled
            beta = None if i == last else logits.beta[i]
            segment, exports, loss = run_relaxed_block(
                net, i, state, params=params, env=env, batch=batch, beta=beta, with_heads=with_heads
            )
            if with_heads:
                losses.append(loss.detach())
            local_gradient: dict[Leaf, Tensor] = {}
            if i < last:
                env.update(exports)
                wanted = [*segment.boundary.values(), *segment.head_weights.values()]
                of_loss = gradients([loss], wanted, None, create_graph)
                accumulate(grads, present(segment.head_weights, of_loss[len(segment.boundary) :]))
                local_gradient = present(segment.boundary, of_loss)
                if sampled is not None and with_heads:
                    local_gradient = {leaf: sampled[i] * t for leaf, t in local_gradient.items()}
            segments.append((replace(segment, head_weights={}), local_gradient))
            del exports, loss, segment  # the graph of the heads is freed here
        env.clear()
        cotangents = {LOSS: torch.ones_like(losses[-1])}  # U_v of every live value v that crosses cut i
        for i in reversed(range(len(net.blocks))):
            segment, local_gradient = segments.pop()  # the graph above it is freed
            if i < last:
                if records is not None:
                    records[i].local_gradient, records[i].upper_gradient = local_gradient, dict(cotangents)
                cotangents = {leaf: rates[i, 1] * t for leaf, t in cotangents.items()}
                accumulate(cotangents, {leaf: rates[i, 0] * t for leaf, t in local_gradient.items()})
            accumulate(grads, segment.pull_back(cotangents, create_graph))
    by_block = [Tensors() for _ in net.blocks]
    for (k, n), t in grads.items():
        by_block[k][n] = t
    return RelaxedGradients(by_block, losses)


def sample_cuts(cuts: int, count: int, draws: torch.Generator | None = None) -> dict[int, float]:
    """Draw some of the cuts without replacement, every set with the same probability.

    A step that runs the heads of these cuts alone (`sampled` of :func:`relaxed_gradients`) costs about
    ``count / cuts`` of what all heads cost.

    Args:
        cuts: how many there are.
        count: how many to draw.
        draws: generator; None: PyTorch's global one.

    Returns:
        Each drawn cut with its weight w = cuts / count, in ascending order.

    Raises:
        SettingsError: `count` is below 1 or above `cuts`.
    """
    if not 1 <= count <= cuts:
        raise SettingsError(f"cannot draw {count} of {cuts} cuts: take 1 to {cuts}")
    drawn = torch.randperm(cuts, generator=draws)[:count].sort().values
    return dict.fromkeys(drawn.tolist(), cuts / count)
