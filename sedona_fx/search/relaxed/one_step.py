"""The exact gradient with respect to alpha and beta through one training step, without a second-order graph of the net.

With v the validation gradient at the stepped weights, the step w' = w - lr (momentum m + g + decay w) gives

    dL/d(alpha, beta) = -lr d<v, g>/d(alpha, beta)        g: the relaxed gradient

and <v, g> unfolds along the net, from the input up. Let t_i be the tangent of the values that cross cut i, when weights
move along v and every earlier cut k lets a tangent through at the rate p_through,k:

    t_i = J_h (p_through,i-1 t_(i-1)) + J_w v_i                    (p_through,0 = 1)
    d<v, g>/dp_isolate,i = <t_i, dl_i/dh_i>        d<v, g>/dp_through,i = <t_i, U_i>

dl_i/dh_i and U_i are what the training step has computed anyway. beta_i enters through l_i alone:

    d<v, g>/dbeta_i = d/dbeta_i ( p_isolate,i <t_i, dl_i/dh_i> + <v_heads, dl_i/dw_heads> )

which needs second derivatives of one cut's heads at a time. Equal to reverse mode through the unrolled step
(:func:`~sedona_fx.search.relaxed.hypergradient.hypergradient` with one batch) to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from sedona_fx.search.relaxed.block_forward import Ascent, ascend, run_block
from sedona_fx.search.relaxed.hypergradient import HyperGradient, validation_gradient
from sedona_fx.search.relaxed.second_order import ShortSecondDerivatives
from sedona_fx.search.relaxed.state import LocalLoss, RelaxedBlock, State, Tensors, clones, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.relaxed.vjp import Leaf, gradients, named
from sedona_fx.search.session.batches import Batch


def one_step_hypergradient(
    blocks: Sequence[RelaxedBlock],
    state: State,
    alpha: Tensor,
    beta: Sequence[Tensor],
    train_batch: Batch,
    val_batch: Batch,
    local_loss: LocalLoss,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    with_beta: bool = True,
) -> HyperGradient:
    """Exact gradient of the final output's validation loss, one relaxed step on from `state`.

    Arguments and result are those of :func:`~sedona_fx.search.relaxed.hypergradient.hypergradient`; `state` and everything else
    are left as they are. No graph is alive for longer than its block's turn, but for what the training step itself
    keeps; the gradients at the cuts are kept from the one pass to the other, two activations a cut.

    Args:
        blocks: see there.
        state: see there.
        alpha: see there.
        beta: see there.
        train_batch: of the one step.
        val_batch: see there.
        local_loss: see there.
        lr: see there.
        momentum: see there.
        weight_decay: see there.
        with_beta: take the gradient of beta as well; else its gradients are zero.
    """
    alpha, beta = alpha.detach(), [b.detach() for b in beta]
    seen: list[Ascent] = []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        stepped = replace(state, buffers=clones(state.buffers))
        found = relaxed_gradients(blocks, stepped, alpha, beta, *train_batch, local_loss, create_graph=False, seen=seen)
        with torch.no_grad():
            stepped = sgd_momentum_step(stepped, found.grads, lr, momentum, weight_decay, differentiable=True)
        # A weight that got no gradient does not move, whatever alpha and beta say.
        direction, val_loss = validation_gradient(blocks, stepped, val_batch, local_loss)
        moved = [{n: v for n, v in d.items() if n in g} for d, g in zip(direction, found.grads, strict=True)]
        del stepped, found, direction
        by_rate, by_beta = _tangents(blocks, state, alpha, beta, train_batch, local_loss, moved, seen, with_beta)
    p = alpha.softmax(1)
    alpha_grad = -lr * p * (by_rate - (p * by_rate).sum(1, keepdim=True))
    return HyperGradient(alpha_grad, [-lr * g for g in by_beta], val_loss)


def _tangents(
    blocks: Sequence[RelaxedBlock],
    state: State,
    alpha: Tensor,
    beta: Sequence[Tensor],
    batch: Batch,
    local_loss: LocalLoss,
    direction: Sequence[Tensors],
    seen: Sequence[Ascent],
    with_beta: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Run the tangents up; return d<v, g>/d(p_isolate, p_through), (B-1, 2), and d<v, g>/dbeta."""
    inputs, target = batch
    p = alpha.softmax(1)
    by_rate, by_beta = torch.zeros_like(alpha), [torch.zeros_like(b) for b in beta]
    working = replace(state, buffers=clones(state.buffers))
    held = [{n: t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    env: dict[str, Any] = {}
    tangents: dict[Leaf, Tensor] = {}  # of the live values that cross, as later blocks see them
    for i in range(len(blocks) - 1):
        if not with_beta and (run := _forward_mode(blocks[i], working, direction, i, env, inputs, tangents, seen[i])):
            exports, made = run
            arriving = tangents | made
            by_rate[i, 0], by_rate[i, 1] = _inner(arriving, seen[i].local), _inner(arriving, seen[i].above)
            tangents = {leaf: p[i, 1] * t for leaf, t in arriving.items()}
            env.update(exports)
            continue
        mixture = beta[i].clone().requires_grad_(with_beta)
        with ShortSecondDerivatives():
            with torch.random.fork_rng(devices=seen[i].devices):
                seen[i].replay_draws()
                stretch, exports, loss = ascend(
                    blocks, i, working, held, env, inputs, target, mixture, local_loss, heads=with_beta
                )
            given = {slot: direction[slot[0]][slot[1]] for slot in stretch.weights if slot[1] in direction[slot[0]]}
            made = _push_forward(stretch.made, stretch.weights, given, stretch.read, tangents)
            end, at_end = next(iter(stretch.ends.items())) if stretch.ends else (None, None)
            arriving = tangents | made
            if end is not None and end in arriving:
                by_rate[i, 0] = _inner(arriving, seen[i].local)
            by_rate[i, 1] = _inner(arriving, seen[i].above)
            if with_beta and loss.requires_grad:
                heads = {slot: t for slot, t in stretch.heads.items() if slot[1] in direction[slot[0]]}
                along = [direction[k][n] for k, n in heads]
                wanted = list(heads.values())
                if end is not None and at_end is not None and end in arriving:
                    wanted.append(at_end)
                    along.append(p[i, 0] * arriving[end])
                by_beta[i] = _second(loss, wanted, along, mixture)
        tangents = {leaf: p[i, 1] * t for leaf, t in arriving.items()}
        env.update({n: pytree.tree_map_only(Tensor, _leaf_again, v) for n, v in exports.items()})
        del stretch, exports, loss
    return by_rate, by_beta


def _forward_mode(
    block: RelaxedBlock,
    state: State,
    direction: Sequence[Tensors],
    i: int,
    env: Mapping[str, Any],
    inputs: Mapping[str, Any],
    entering: Mapping[Leaf, Tensor],
    seen: Ascent,
) -> tuple[dict[str, Any], dict[Leaf, Tensor]] | None:
    """Run block i without its heads and its tangents beside it, in PyTorch's forward mode; return its exports and
    their tangents.

    None where an operator knows no forward mode, or the block has no form without heads.
    """
    if block.trunk is None:
        return None
    # PyTorch scripts some of its formulas of the forward mode, in a way that it deprecates.
    quiet, streams = warnings.catch_warnings(), torch.random.fork_rng(devices=seen.devices)
    with quiet, streams, torch.no_grad(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        seen.replay_draws()

        def dual(leaf: Leaf, t: Any) -> Any:
            if leaf not in entering:
                return t
            return forward_ad.make_dual(t.detach(), entering[leaf])

        values = {n: _with_leaves(n, v, dual) for n, v in env.items() if n in block.inputs}
        tensors = state.used(state.buffers, i)
        for n, (k, m) in state.slots(state.params, i).items():
            w = state.params[k][m].detach()
            tensors[n] = forward_ad.make_dual(w, direction[k][m]) if m in direction[k] else w
        try:
            exports, _ = run_block(block, block.trunk, tensors, None, {**inputs, **values})
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            return None
        made: dict[Leaf, Tensor] = {}

        def split(leaf: Leaf, t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            primal, tangent = forward_ad.unpack_dual(t)
            if tangent is None:
                return primal
            made[leaf] = tangent
            return primal.detach().requires_grad_()  # a later block without forward mode starts its own graph there

        return {n: _with_leaves(n, v, split) for n, v in exports.items()}, made


def _with_leaves(name: str, value: Any, change: Callable[[Leaf, Any], Any]) -> Any:
    """Return a named value with its parts changed, each told its place."""
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([change((name, k), leaf) for k, leaf in enumerate(leaves)], spec)


def _push_forward(
    made: dict[Leaf, Tensor],
    weights: dict[Any, Tensor],
    moving: dict[Any, Tensor],
    read: dict[Leaf, Tensor],
    entering: dict[Leaf, Tensor],
) -> dict[Leaf, Tensor]:
    """Return the tangents of what a block made: J_h t + J_w v, by two products with the transpose.

    J^T u is linear in u, and its derivative by u along (t, v) is J (t, v): any operator that can be differentiated
    twice will do, whether it knows forward mode or not.
    """
    sources = [*[weights[slot] for slot in moving], *[t for leaf, t in read.items() if leaf in entering]]
    along = [*moving.values(), *[entering[leaf] for leaf in read if leaf in entering]]
    if not sources or not made:
        return {}
    probes = {leaf: torch.zeros_like(t).requires_grad_() for leaf, t in made.items()}
    pulled = gradients(list(made.values()), sources, list(probes.values()), create_graph=True)
    pairs = [(g, a) for g, a in zip(pulled, along, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return {}
    got = torch.autograd.grad(
        [g for g, _ in pairs], list(probes.values()), [a for _, a in pairs], retain_graph=True, allow_unused=True
    )
    return named(probes, got)


def _second(loss: Tensor, wanted: Sequence[Tensor], along: Sequence[Tensor], mixture: Tensor) -> Tensor:
    """Return d/dmixture of <d loss/d wanted, along>."""
    first = gradients([loss], list(wanted), None, create_graph=True)
    pairs = [(g, a) for g, a in zip(first, along, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(mixture)
    (got,) = torch.autograd.grad([g for g, _ in pairs], [mixture], [a for _, a in pairs], allow_unused=True)
    return torch.zeros_like(mixture) if got is None else got


def _inner(tangents: dict[Leaf, Tensor], gradient: dict[Leaf, Tensor]) -> Tensor | float:
    terms = [(tangents[leaf] * g).sum() for leaf, g in gradient.items() if leaf in tangents]
    return torch.stack(terms).sum() if terms else 0.0


def _leaf_again(tensor: Tensor) -> Tensor:
    """Cut a value off; where it carries a gradient, the next block's own graph starts there."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
