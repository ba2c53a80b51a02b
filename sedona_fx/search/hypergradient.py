"""The exact gradient of a validation loss with respect to alpha and beta, through training steps of the relaxed net.

The bilevel problem of SEDONA (Pyeon et al., ICLR 2021): minimise over (alpha, beta) the validation loss of the *final*
output, at the weights that T steps of relaxed training lead to. Reverse mode over unrolled steps; whatever else gives
the same number (one step in forward mode, say) can stand beside it on `validation_gradient`.
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

from sedona_fx.search.ascent import run_block
from sedona_fx.search.relaxed import relaxed_gradients
from sedona_fx.search.state import Batch, LocalLoss, RelaxedBlock, State, Tensors, clones, sgd_momentum_step
from sedona_fx.search.vjp import gradients, named


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
) -> HyperGradient:
    """Exact gradient of the final output's validation loss, T = len(train_batches) relaxed steps on from `state`.

    The validation forward does not depend on alpha or beta; they act through the steps alone, so the gradient is
    (dw_T/d(alpha, beta))^T (d val_loss/d w_T), all orders kept. `state`, the blocks' own tensors, alpha and beta are
    left as they are: the steps work on cloned buffers, so that a snapshot's BatchNorm does not count them. All T
    graphs are alive at once, that of the validation batch no longer than its own backward.
    """
    alpha, beta = alpha.detach().requires_grad_(), [b.detach().requires_grad_() for b in beta]
    stepped = replace(state, buffers=clones(state.buffers))
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for inputs, target in train_batches:
            found = relaxed_gradients(blocks, stepped, alpha, beta, inputs, target, local_loss, create_graph=True)
            stepped = sgd_momentum_step(stepped, found.grads, lr, momentum, weight_decay, differentiable=True)
        cotangents, val_loss = validation_gradient(blocks, stepped, val_batch, local_loss)
        pairs = [(stepped.params[i][n], v) for i, d in enumerate(cotangents) for n, v in d.items()]
        pairs = [(w, v) for w, v in pairs if w.requires_grad]
        del stepped, cotangents
        wanted = [alpha, *beta]
        roots = [w for w, _ in pairs]
        got: Sequence[Tensor | None] = [None] * len(wanted)
        if roots:
            got = torch.autograd.grad(roots, wanted, [v for _, v in pairs], allow_unused=True)
    full = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, got, strict=True)]
    return HyperGradient(full[0], full[1:], val_loss)


def validation_gradient(
    blocks: Sequence[RelaxedBlock], state: State, batch: Batch, local_loss: LocalLoss
) -> tuple[list[Tensors], Tensor]:
    """Return d(loss of the final output)/d(weights) by block and name, at `state` taken as constant, and the loss.

    Evaluation graph (no dropout), but batch statistics in BatchNorm: running statistics carry no gradient, and would
    hide how the steps changed the activations. They are updated in `state.buffers`: hand in a copy. Nothing is scaled
    or cut here: one ordinary backward sums over the blocks that share a weight.
    """
    inputs, target = batch
    params = [{n: t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    env: dict[str, Any] = dict(inputs)
    output: Any = None
    with torch.enable_grad(), batch_statistics(blocks):
        for i, block in enumerate(blocks):
            tensors = state.used(params, i) | state.used(state.buffers, i)
            exports, output = run_block(block, block.eval_module, tensors, None, env)
            env |= exports
        loss = local_loss(len(blocks) - 1, output, target)
        del output, exports, env
        found = iter(gradients([loss], [t for d in params for t in d.values()], None, create_graph=False))
    return [named(d, [next(found) for _ in d]) for d in params], loss.detach()


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
