"""The exact gradient of a validation loss with respect to alpha and beta, through training steps of the relaxed net.

The bilevel problem of SEDONA (Pyeon et al., ICLR 2021): minimise over (alpha, beta) the validation loss of the *final*
output, at the weights that T steps of relaxed training lead to. Reverse mode, one step at a time from the last. With g
the relaxed gradient, a step m' = mu m + g(w) + decay w, w' = w - lr m' hands the cotangents of (w', m') down as

    c = c_m' - lr c_w'        c_w = c_w' + decay c + (dg/dw)^T c        c_m = mu c

and adds (dg/d(alpha, beta))^T c to the result. So one step's second-order graph at a time is enough: the way up keeps
the states that the steps started from, and the way down does each step but the last again. Whatever else gives the same
number (one step in forward mode, say) can stand beside it on `validation_gradient`.
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

from sedona_fx.search.relaxed.block_forward import run_block
from sedona_fx.search.relaxed.state import LocalLoss, RelaxedBlock, Slot, State, Tensors, clones, sgd_momentum_step
from sedona_fx.search.relaxed.unrolled_step import UnrolledStep
from sedona_fx.search.relaxed.vjp import add, gradients, named
from sedona_fx.search.session.batches import Batch


@dataclass(frozen=True)
class HyperGradient:
    """d(validation loss)/d(alpha) of shape (B-1, 2), d/d(beta) as B-1 tensors of shape (M_i,), and the loss, 0-d."""

    alpha_grad: Tensor
    beta_grads: list[Tensor]
    val_loss: Tensor


def hypergradient(
    blocks: Sequence[RelaxedBlock],
    state: State,
    alpha: Tensor,
    beta: Sequence[Tensor],
    train_batches: Sequence[Batch],
    val_batch: Batch,
    local_loss: LocalLoss,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    recompute: bool = True,
) -> HyperGradient:
    """Exact gradient of the final output's validation loss, T = len(train_batches) relaxed steps on from `state`.

    The validation forward does not depend on alpha or beta; they act through the steps alone, so the gradient is
    (dw_T/d(alpha, beta))^T (d val_loss/d w_T), all orders kept. `state`, the blocks' own tensors, alpha and beta are
    left as they are: the steps work on cloned buffers, so that a snapshot's BatchNorm does not count them.

    With `recompute`, the graph of one step is alive at a time, beside T states; dropout draws the same when a step is
    done again. Without, all T graphs are alive: the same numbers, for T - 1 first-order steps less work. The graph of
    the validation batch is alive no longer than its own backward.
    """
    stepped = replace(state, buffers=clones(state.buffers))
    steps: list[UnrolledStep] = []
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for t, batch in enumerate(train_batches):
            steps.append(UnrolledStep(blocks, stepped, alpha, beta, batch, local_loss))
            keep_graph = not recompute or t + 1 == len(train_batches)
            found = steps[-1].gradients(stepped.buffers, keep_graph=keep_graph)
            with torch.no_grad():
                stepped = sgd_momentum_step(stepped, found, lr, momentum, weight_decay, differentiable=True)
        by_name, val_loss = validation_gradient(blocks, stepped, val_batch, local_loss)
        del stepped, found
        by_weight = {(i, n): t for i, d in enumerate(by_name) for n, t in d.items()}
        by_momentum: dict[Slot, Tensor] = {}
        result = dict(enumerate(torch.zeros_like(t) for t in (alpha, *beta)))
        while steps:
            step = steps.pop()
            along = {slot: by_momentum.pop(slot) for slot in step.graded if slot in by_momentum}
            add(along, {slot: -lr * by_weight[slot] for slot in step.graded if slot in by_weight})
            shares, through = step.pull_back(along, weights=bool(steps))
            add(result, named(result, shares))
            by_momentum |= {slot: momentum * c for slot, c in along.items()}
            add(by_weight, {slot: weight_decay * c for slot, c in along.items()})
            add(by_weight, through)
    return HyperGradient(result[0], [result[k + 1] for k in range(len(beta))], val_loss)


def validation_gradient(
    blocks: Sequence[RelaxedBlock], state: State, batch: Batch, local_loss: LocalLoss
) -> tuple[list[Tensors], Tensor]:
    """Return d(loss of the final output)/d(weights) by block and name, at `state` taken as constant, and the loss.

    Evaluation graph (no dropout), but batch statistics in BatchNorm: running statistics carry no gradient, and would
    hide how the steps changed the activations. They are updated in `state.buffers`: hand in a copy. Nothing is scaled
    or cut here: one ordinary backward sums over the blocks that share a weight.
    """
    params = [{n: t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    with torch.enable_grad(), batch_statistics(blocks):
        loss = _final_loss(blocks, state, params, batch, local_loss)
        found = iter(gradients([loss], [t for d in params for t in d.values()], None, create_graph=False))
    return [named(d, [next(found) for _ in d]) for d in params], loss.detach()


def validation_loss(blocks: Sequence[RelaxedBlock], state: State, batch: Batch, local_loss: LocalLoss) -> Tensor:
    """Return the loss that :func:`validation_gradient` differentiates, 0-d, without its backward."""
    with torch.no_grad(), batch_statistics(blocks):
        return _final_loss(blocks, state, state.params, batch, local_loss)


def _final_loss(
    blocks: Sequence[RelaxedBlock], state: State, params: Sequence[Tensors], batch: Batch, local_loss: LocalLoss
) -> Tensor:
    inputs, target = batch
    env: dict[str, Any] = dict(inputs)
    output: Any = None
    for i, block in enumerate(blocks):
        tensors = state.used(params, i) | state.used(state.buffers, i)
        exports, output = run_block(block, block.eval_module, tensors, None, env)
        env |= exports
    return local_loss(len(blocks) - 1, output, target)


@contextmanager
def batch_statistics(blocks: Sequence[RelaxedBlock]) -> Iterator[None]:
    """Evaluation mode for the eval modules, except that norms which train with batch statistics use them here too.

    A norm that is frozen in the train graph (BatchNorm in evaluation mode there) stays frozen. All flags are restored.
    """
    flags = {m: m.training for b in blocks for m in b.eval_module.modules()}
    live = set()
    for block in blocks:
        training = {n: m.training for n, m in block.module.named_modules()}
        live |= {m for n, m in block.eval_module.named_modules() if isinstance(m, _NormBase) and training.get(n, True)}
    try:
        for m in flags:
            m.training = m in live
        yield
    finally:
        for m, was in flags.items():
            m.training = was
