"""The relaxed net and its training step.

SEDONA (Pyeon et al., ICLR 2021) relaxes "cut here or not" to a softmax over two logits a base layer. With l_i the
local loss of the mixed head at base layer i and p = softmax(alpha),

    Lt_B = l_B        Lt_i = p_isolate,i * l_i + p_through,i * Lt_(i+1)

base layer j follows the gradient of Lt_j, and the heads at i follow l_i at full rate. No single scalar has all these
gradients. An identity that scales its backward would give them, but its *second* derivatives are wrong: they walk back
through the scaled edges of the forward graph. So the forward graph is left whole, and the gradients entering base layer
i from above are combined by hand. With h_i its boundary, which the heads read, and U_v = dLt_(i+1)/dv for every value v
that crosses cut i,

    G_h_i = p_isolate,i * dl_i/dh_i + p_through,i * U_h_i
    G_v   = p_through,i * U_v        every other v: also made in base layer i, or passing by on its way to a later one

One vector-Jacobian product a base layer, from the top: its roots are all that it made, their cotangents are G. What
passes by keeps G as its U at the next cut down. Every one of the products can itself be differentiated. A weight that
several base layers use gets the sum of what each of them gives it, of its own Lt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sedona_fx.search.relaxed.block_forward import LOSS, Ascent, Stretch, ascend
from sedona_fx.search.relaxed.second_order import ShortSecondDerivatives
from sedona_fx.search.relaxed.state import LocalLoss, RelaxedBlock, Slot, State, Tensors
from sedona_fx.search.relaxed.vjp import Leaf, add, gradients, named


@dataclass(frozen=True)
class RelaxedGradients:
    """Gradients by block and name, laid out as `State.params` (a parameter that gets none is absent); and the losses.

    The losses are the local ones that were evaluated, the final one last: B detached scalars if all were.
    """

    grads: list[Tensors]
    losses: list[Tensor]


def relaxed_gradients(
    blocks: Sequence[RelaxedBlock],
    state: State,
    alpha: Tensor,
    beta: Sequence[Tensor],
    inputs: Mapping[str, Any],
    target: Any,
    local_loss: LocalLoss,
    create_graph: bool,
    seen: list[Ascent] | None = None,
    sampled: Mapping[int, float] | None = None,
) -> RelaxedGradients:
    """Gradients of the relaxed net on one batch: base layer j that of Lt_j, the heads at i that of l_i.

    With `sampled`, only the cuts in it run their heads; there w l_i takes the place of l_i in every Lt_j, and
    everywhere else 0. Every Lt_j is linear in the l_i, so where cut i is drawn with probability 1/w_i the gradients of
    the base layers are right on average, at the given weights and batch. The heads that are run follow their own l_i,
    unscaled, as in any step; the others get no gradient and keep weights, momentum and statistics.

    Args:
        blocks: the B base layers, in order.
        state: weights to take them at. Its buffers are updated in place, as a training forward does.
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        inputs: the network's inputs by name.
        target: handed to `local_loss(block, local, target)`, which returns a scalar.
        local_loss: the loss of one block.
        create_graph: keep the gradients differentiable in alpha, beta and the weights. If not, each layer's part of
            the forward graph is freed as soon as it has been walked, a head's right after its forward.
        seen: gets what the step met at each cut.
        sampled: cut -> w, see :func:`sample_cuts`. None: all, each with 1.

    Raises:
        ValueError: a head uses a weight of the base layer in front of it.
    """
    if not create_graph:
        alpha, beta = alpha.detach(), [b.detach() for b in beta]
    p, last = alpha.softmax(1), len(blocks) - 1
    held = [{n: t if t.requires_grad else t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    env: dict[str, Any] = {}  # the exports of the blocks so far
    grads: dict[Slot, Tensor] = {}
    losses: list[Tensor] = []

    device = alpha.device
    stretches: list[tuple[Stretch, dict[Leaf, Tensor]]] = []  # each with dl_i/dh_i
    with torch.enable_grad(), ShortSecondDerivatives() if create_graph else nullcontext():
        for i in range(len(blocks)):
            if seen is not None and i < last:
                seen.append(Ascent.begin(device))
            mixture = None if i == last else beta[i]
            headed = i == last or sampled is None or i in sampled
            stretch, exports, loss = ascend(blocks, i, state, held, env, inputs, target, mixture, local_loss, headed)
            losses += [loss.detach()] if headed else []
            local: dict[Leaf, Tensor] = {}
            if i < last:
                env.update(exports)
                wanted = [*stretch.ends.values(), *stretch.heads.values()]
                found = gradients([loss], wanted, None, create_graph)
                add(grads, named(stretch.heads, found[len(stretch.ends) :]))
                local = named(stretch.ends, found)
                if sampled is not None and headed:
                    local = {leaf: sampled[i] * t for leaf, t in local.items()}
            stretches.append((replace(stretch, heads={}), local))
            del exports, loss, stretch  # the graph of the heads dies here
        env.clear()
        above = {LOSS: torch.ones_like(losses[-1])}  # dLt_(i+1)/dv for every live value v that crosses cut i
        for i in reversed(range(len(blocks))):
            stretch, local = stretches.pop()  # so that what lies above it is freed
            if i < last:
                if seen is not None:
                    seen[i].local, seen[i].above = local, dict(above)
                above = {leaf: p[i, 1] * t for leaf, t in above.items()}
                add(above, {leaf: p[i, 0] * t for leaf, t in local.items()})
            add(grads, stretch.descend(above, create_graph))
    by_block = [Tensors() for _ in blocks]
    for (k, n), t in grads.items():
        by_block[k][n] = t
    return RelaxedGradients(by_block, losses)


def sample_cuts(cuts: int, count: int, draws: torch.Generator | None = None) -> dict[int, float]:
    """Draw `count` of so many cuts without replacement, all sets alike; return each drawn with its w = cuts / count.

    A step that runs their heads alone (`relaxed_gradients`' `sampled`) costs about ``count / cuts`` of the heads' part.

    Raises:
        ValueError: there are not as many, or none is asked for.
    """
    if not 1 <= count <= cuts:
        raise ValueError(f"cannot draw {count} of {cuts} cuts: take 1 to {cuts}")
    drawn = torch.randperm(cuts, generator=draws)[:count].sort().values
    return dict.fromkeys(drawn.tolist(), cuts / count)
