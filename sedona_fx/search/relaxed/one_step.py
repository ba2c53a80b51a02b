"""The exact gradient with respect to alpha and beta through one training step, without a second-order graph of the net.

With v the validation gradient at the stepped weights, the step w' = w - lr (momentum m + g + decay w) gives

    dL/d(alpha, beta) = -lr d<v, g>/d(alpha, beta)        g: the relaxed gradient

and <v, g> unfolds along the net, from the input up. Let t_i be the tangents of the values that cross cut i, when the
weights move along v and every earlier cut k lets tangents through at the rate p_through,k:

    t_i = J_h (p_through,i-1 t_(i-1)) + J_w v_i                    (p_through,0 = 1)
    d<v, g>/dp_isolate,i = <t_i, dl_i/dh_i>        d<v, g>/dp_through,i = <t_i, U_i>

The training step has computed dl_i/dh_i and U_i already. beta_i enters through l_i alone:

    d<v, g>/dbeta_i = d/dbeta_i ( p_isolate,i <t_i, dl_i/dh_i> + <v_heads, dl_i/dw_heads> )

which needs second derivatives of one cut's heads at a time. The result equals reverse mode through the unrolled step
(:func:`~sedona_fx.search.relaxed.hypergradient.hypergradient` with one batch) up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from sedona_fx.search.relaxed.block_forward import Segment, run_relaxed_block
from sedona_fx.search.relaxed.cut_record import CutRecord
from sedona_fx.search.relaxed.hypergradient import HyperGradient, validation_gradient
from sedona_fx.search.relaxed.second_order import short_second_derivatives
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, Slot, State, by_slot, clones, leaves, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.relaxed.vjp import Leaf, gradients, inner, present
from sedona_fx.search.session.batches import NamedBatch


def one_step_hypergradient(
    net: RelaxedNet,
    state: State,
    logits: Logits,
    train_batch: NamedBatch,
    val_batch: NamedBatch,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> HyperGradient:
    """Return the exact gradient of the final output's validation loss, one relaxed step after `state`.

    Apart from what the training step itself keeps, a block's graph is alive only while that block is being visited. The
    gradients at the cuts are kept from the training step to the tangents: two activations per cut.

    Args:
        net: the relaxed net.
        state: weights, buffers and momentum before the step. Left unchanged, as the blocks' own tensors and the logits
            are.
        logits: alpha and beta.
        train_batch: what the step is taken on.
        val_batch: what the validation loss is taken on.
        lr: learning rate of the step's SGD.
        momentum: of SGD.
        weight_decay: of SGD.
    """
    logits = logits.detached()
    records: list[CutRecord] = []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        stepped = replace(state, buffers=clones(state.buffers))
        relaxed = relaxed_gradients(net, stepped, logits, train_batch, create_graph=False, records=records)
        stepped = sgd_momentum_step(
            stepped, relaxed.grads, lr=lr, momentum=momentum, weight_decay=weight_decay, in_place=False
        )
        validation, val_loss = validation_gradient(net, stepped, val_batch)
        # A weight without gradient does not move, whatever alpha and beta are.
        moved = by_slot(relaxed.grads).keys()
        direction = {slot: v for slot, v in by_slot(validation).items() if slot in moved}
        del stepped, relaxed, validation
        by_rate, by_beta = _derivatives_along(
            direction, net=net, state=state, logits=logits, batch=train_batch, records=records
        )
    p = logits.alpha.softmax(1)
    alpha_grad = -lr * p * (by_rate - (p * by_rate).sum(1, keepdim=True))
    return HyperGradient(alpha_grad, [-lr * g for g in by_beta], val_loss)


def _derivatives_along(
    direction: Mapping[Slot, Tensor],
    *,
    net: RelaxedNet,
    state: State,
    logits: Logits,
    batch: NamedBatch,
    records: Sequence[CutRecord],
) -> tuple[Tensor, list[Tensor]]:
    """Push the tangents through the net, with v = `direction`.

    Returns:
        d<v, g>/d(p_isolate, p_through), (B-1, 2), and d<v, g>/dbeta, B-1 tensors (M_i,).
    """
    p = logits.alpha.softmax(1)
    by_rate, by_beta = torch.zeros_like(logits.alpha), [torch.zeros_like(b) for b in logits.beta]
    working = replace(state, buffers=clones(state.buffers))
    params = leaves(state.params)
    env: dict[str, Any] = {}
    tangents: dict[Leaf, Tensor] = {}  # p_through t, of the live values that cross the cut before block i
    for i, record in enumerate(records):
        beta = logits.beta[i].clone().requires_grad_()
        with short_second_derivatives(net):
            with record.generators.replayed():
                segment, exports, loss = run_relaxed_block(
                    net, i, working, params=params, env=env, batch=batch, beta=beta
                )
            crossing = tangents | _push_forward(segment, direction, tangents)  # t_i
            by_rate[i, 0] = _inner(crossing, record.local_gradient)
            by_rate[i, 1] = _inner(crossing, record.upper_gradient)
            if loss.requires_grad:
                isolated = {leaf: p[i, 0] * t for leaf, t in crossing.items() if leaf in segment.boundary}
                by_beta[i] = _by_beta(beta, loss, segment, direction, isolated)
        tangents = {leaf: p[i, 1] * t for leaf, t in crossing.items()}
        env.update({n: pytree.tree_map_only(Tensor, _as_leaf, value) for n, value in exports.items()})
        del segment, exports, loss
    return by_rate, by_beta


def _push_forward(
    segment: Segment, direction: Mapping[Slot, Tensor], entering: Mapping[Leaf, Tensor]
) -> dict[Leaf, Tensor]:
    """Return the tangents J_h t + J_w v of a segment's outputs, by two products with the transposed Jacobian.

    J^T u is linear in u, and its derivative with respect to u along (t, v) is J (t, v). So any operator that can be
    differentiated twice will do, whether it has a forward mode or not.

    Args:
        segment: of one block.
        direction: v.
        entering: t, of values that the block may read.
    """
    moving = [(t, direction[slot]) for slot, t in segment.weights.items() if slot in direction]
    moving += [(t, entering[leaf]) for leaf, t in segment.inputs.items() if leaf in entering]
    if not moving or not segment.outputs:
        return {}
    probes = {leaf: torch.zeros_like(t).requires_grad_() for leaf, t in segment.outputs.items()}
    pulled = gradients([*segment.outputs.values()], [t for t, _ in moving], [*probes.values()], create_graph=True)
    terms = [(g, v) for g, (_, v) in zip(pulled, moving, strict=True) if g is not None and g.requires_grad]
    if not terms:
        return {}
    pushed = torch.autograd.grad(
        [g for g, _ in terms], [*probes.values()], [v for _, v in terms], retain_graph=True, allow_unused=True
    )
    return present(probes, pushed)


def _by_beta(
    beta: Tensor, loss: Tensor, segment: Segment, direction: Mapping[Slot, Tensor], isolated: Mapping[Leaf, Tensor]
) -> Tensor:
    """Return d/dbeta ( <isolated, dl/dh> + <v_heads, dl/dw_heads> ) of one cut, with v = `direction`."""
    moving = [(t, direction[slot]) for slot, t in segment.head_weights.items() if slot in direction]
    moving += [(segment.boundary[leaf], t) for leaf, t in isolated.items()]
    first = gradients([loss], [t for t, _ in moving], None, create_graph=True)
    terms = [(g, v) for g, (_, v) in zip(first, moving, strict=True) if g is not None and g.requires_grad]
    if not terms:
        return torch.zeros_like(beta)
    (second,) = torch.autograd.grad([g for g, _ in terms], [beta], [v for _, v in terms], allow_unused=True)
    return torch.zeros_like(beta) if second is None else second


def _inner(tangents: Mapping[Leaf, Tensor], gradient: Mapping[Leaf, Tensor]) -> Tensor | float:
    """Return the inner product over the values that both have."""
    terms = [inner(tangents[leaf], g) for leaf, g in gradient.items() if leaf in tangents]
    return torch.stack(terms).sum() if terms else 0.0


def _as_leaf(tensor: Tensor) -> Tensor:
    """Cut a value off its graph; one that carries a gradient becomes a leaf, where the next block's graph starts."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
