"""The exact gradient of a validation loss with respect to alpha and beta, through training steps of the relaxed net.

The bilevel problem of SEDONA (Pyeon et al., ICLR 2021): minimise over (alpha, beta) the validation loss of the *final*
output, at the weights that T steps of relaxed training lead to. This is reverse mode, one step at a time from the last.
With g the relaxed gradient, a training step m' = mu m + g(w) + decay w, w' = w - lr m' turns the cotangents of (w', m')
into those of (w, m):

    c = c_m' - lr c_w'        c_w = c_w' + decay c + (dg/dw)^T c        c_m = mu c

and adds (dg/d(alpha, beta))^T c to the result. So one second-order graph at a time is enough: the forward sweep keeps
the states that the steps started from, and the backward sweep recomputes every step but the last.

Other ways to the same number start from :func:`validation_gradient` too
(:mod:`~sedona_fx.search.relaxed.one_step`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from sedona_fx.ir.modules import keep_modes
from sedona_fx.search.relaxed.block_forward import run_block
from sedona_fx.search.relaxed.state import (
    Logits,
    RelaxedBlock,
    RelaxedNet,
    Slot,
    State,
    Tensors,
    by_slot,
    clones,
    leaves,
    sgd_momentum_step,
)
from sedona_fx.search.relaxed.unrolled_step import UnrolledStep
from sedona_fx.search.relaxed.vjp import accumulate, gradients, present
from sedona_fx.search.session.batches import NamedBatch


@dataclass(frozen=True)
class HyperGradient:
    """The validation loss after some training steps, and its gradient.

    Attributes:
        alpha_grad: (B-1, 2).
        beta_grads: B-1 tensors (M_i,).
        val_loss: 0-d.
    """

    alpha_grad: Tensor
    beta_grads: list[Tensor]
    val_loss: Tensor


def hypergradient(
    net: RelaxedNet,
    state: State,
    logits: Logits,
    train_batches: Sequence[NamedBatch],
    val_batch: NamedBatch,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> HyperGradient:
    """Return the exact gradient of the final output's validation loss, some relaxed steps after `state`.

    The validation forward pass does not depend on alpha or beta. They act through the training steps alone, so the
    gradient is (dw_T/d(alpha, beta))^T (d val_loss/d w_T), all orders kept.

    The second-order graph of one step is alive at a time, besides T states; a step that is recomputed repeats its
    random draws (dropout). The graph of the validation batch is freed by its own backward pass.

    Args:
        net: the relaxed net.
        state: weights, buffers and momentum before the first step. Left unchanged, as the blocks' own tensors and the
            logits are: the steps work on cloned buffers, so that a snapshot's BatchNorm does not count them.
        logits: alpha and beta.
        train_batches: one per step, T of them.
        val_batch: what the validation loss is taken on.
        lr: learning rate of the steps' SGD.
        momentum: of SGD.
        weight_decay: of SGD.
    """
    stepped = replace(state, buffers=clones(state.buffers))
    steps: list[UnrolledStep] = []
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for t, batch in enumerate(train_batches):
            steps.append(UnrolledStep(net, stepped, logits, batch))
            grads = steps[-1].gradients(stepped.buffers, keep_graph=t + 1 == len(train_batches))
            stepped = sgd_momentum_step(
                stepped, grads, lr=lr, momentum=momentum, weight_decay=weight_decay, in_place=False
            )
        weight_cotangents, val_loss = validation_gradient(net, stepped, val_batch)
        del stepped, grads
        by_weight = by_slot(weight_cotangents)
        by_momentum: dict[Slot, Tensor] = {}
        by_logit = dict(enumerate(torch.zeros_like(t) for t in logits.tensors()))
        while steps:
            step = steps.pop()
            moved = step.weights_with_gradient
            cotangents = {slot: by_momentum.pop(slot) for slot in moved if slot in by_momentum}
            accumulate(cotangents, {slot: -lr * by_weight[slot] for slot in moved if slot in by_weight})
            through_logits, through_weights = step.pull_back(cotangents, weights=bool(steps))
            accumulate(by_logit, present(by_logit, through_logits))
            by_momentum |= {slot: momentum * c for slot, c in cotangents.items()}
            accumulate(by_weight, {slot: weight_decay * c for slot, c in cotangents.items()})
            accumulate(by_weight, through_weights)
    return HyperGradient(by_logit[0], [by_logit[k + 1] for k in range(len(logits.beta))], val_loss)


def validation_gradient(net: RelaxedNet, state: State, batch: NamedBatch) -> tuple[list[Tensors], Tensor]:
    """Differentiate the loss of the final output with respect to the weights.

    The evaluation graph runs (no dropout), but with batch statistics in BatchNorm: running statistics carry no
    gradient, and would hide how the steps changed the activations. Nothing is scaled or cut here: one ordinary backward
    pass sums over the blocks that share a weight.

    Args:
        net: the relaxed net.
        state: weights, taken as constants, and buffers. Running statistics are updated in place: hand in a copy.
        batch: the net's inputs by name, and the target.

    Returns:
        The gradient by block and name, and the loss, 0-d.
    """
    params = leaves(state.params)
    with torch.enable_grad(), batch_statistics(net.blocks):
        loss = _final_loss(net, state, params, batch)
        grads = iter(gradients([loss], [t for d in params for t in d.values()], None, create_graph=False))
    return [present(d, [next(grads) for _ in d]) for d in params], loss.detach()


def validation_loss(net: RelaxedNet, state: State, batch: NamedBatch) -> Tensor:
    """Return the loss that :func:`validation_gradient` differentiates, 0-d, without a backward pass."""
    with torch.no_grad(), batch_statistics(net.blocks):
        return _final_loss(net, state, state.params, batch)


def _final_loss(net: RelaxedNet, state: State, params: Sequence[Tensors], batch: NamedBatch) -> Tensor:
    inputs, target = batch
    env: dict[str, Any] = dict(inputs)
    output: Any = None
    for i, block in enumerate(net.blocks):
        tensors = state.used(params, i) | state.used(state.buffers, i)
        exports, output = run_block(block, block.eval_module, tensors=tensors, beta=None, env=env)
        env |= exports
    return net.local_loss(len(net.blocks) - 1, output, target)


@contextmanager
def batch_statistics(blocks: Sequence[RelaxedBlock]) -> Iterator[None]:
    """Put the eval modules in evaluation mode, except norms that train with batch statistics: they use them here too.

    A norm that is frozen in the train graph (BatchNorm in evaluation mode there) stays frozen. All flags are restored
    afterwards.
    """
    in_training = set()
    for block in blocks:
        training = {name: m.training for name, m in block.module.named_modules()}
        in_training |= {
            m for name, m in block.eval_module.named_modules() if isinstance(m, _NormBase) and training.get(name, True)
        }
    with keep_modes(*(block.eval_module for block in blocks)):
        for module in (m for block in blocks for m in block.eval_module.modules()):
            module.training = module in in_training
        yield
