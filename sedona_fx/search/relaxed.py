"""The relaxed net and its training step.

SEDONA (Pyeon et al., ICLR 2021) relaxes "cut here or not" to a softmax over two logits a base layer. With l_i the
local loss of the mixed head at base layer i and p = softmax(alpha),

    Lt_B = l_B        Lt_i = p_isolate,i * l_i + p_through,i * Lt_(i+1)

base layer j follows the gradient of Lt_j, and the heads at i follow l_i at full rate. No single scalar has all these
gradients. An identity that scales its backward would give them, but its *second* derivatives are wrong: they walk back
through the scaled edges of the forward graph. So the forward graph is left whole, and the gradient entering base layer
i from above is combined by hand,

    G_i = p_isolate,i * dl_i/dh_i + p_through,i * U_i        U_i = dLt_(i+1)/dh_i

one vector-Jacobian product a base layer, from the top. Every one of them can itself be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

LocalLoss = Callable[[int, Any, Any], Tensor]
Batch = tuple[dict[str, Any], Any]
Tensors = dict[str, Tensor]


class RelaxedBlock(Protocol):
    """One base layer of the relaxed net with the mixture of heads behind it (the last one has none).

    `module(*[env[name] for name in inputs])` returns `(exports, local)`. `local` is the softmax(beta)-weighted sum of
    the heads' outputs on the boundary, unscaled; for the last block it is the model's own output. `exports` are the
    values later blocks read; only the boundary may carry a gradient, and the heads read nothing else that does.
    `eval_module` is the same in evaluation, with the same parameter and buffer names; it may leave the heads out
    (`local` is then read of the last block alone).
    """

    @property
    def module(self) -> nn.Module: ...  # noqa: D102
    @property
    def eval_module(self) -> nn.Module: ...  # noqa: D102
    @property
    def inputs(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def exports(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def boundary(self) -> str | None: ...  # noqa: D102
    @property
    def beta(self) -> str | None: ...  # noqa: D102


@dataclass
class State:
    """Everything a training step of the relaxed net changes: one dictionary a block, by name.

    `params` holds the trainable parameters, those of the heads included and beta left out. Frozen parameters are not
    here: they stay the module's own. Nothing here carries a graph, except between unrolled steps.
    """

    params: list[Tensors]
    buffers: list[Tensors]
    momentum: list[Tensors]

    @classmethod
    def of(cls, blocks: Sequence[RelaxedBlock]) -> State:
        """Copy the blocks' parameters and buffers; momentum starts at zero."""
        params = [
            {n: p.detach().clone() for n, p in b.module.named_parameters() if p.requires_grad and n != b.beta}
            for b in blocks
        ]
        buffers = [{n: t.detach().clone() for n, t in b.module.named_buffers()} for b in blocks]
        return cls(params, buffers, [{n: torch.zeros_like(p) for n, p in d.items()} for d in params])

    def clone(self) -> State:
        """Return an independent copy without graph."""
        return State(clones(self.params), clones(self.buffers), clones(self.momentum))

    @property
    def state_bytes(self) -> int:
        """Bytes held by one copy of this state."""
        dicts = [*self.params, *self.buffers, *self.momentum]
        return sum(t.numel() * t.element_size() for d in dicts for t in d.values())


@dataclass(frozen=True)
class RelaxedGradients:
    """Gradients by block and name (a parameter that gets none is absent), and the B local losses, detached scalars."""

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
) -> RelaxedGradients:
    """Gradients of the relaxed net on one batch: base layer j that of Lt_j, the heads at i that of l_i.

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
    """
    if not create_graph:
        alpha, beta = alpha.detach(), [b.detach() for b in beta]
    p, last = alpha.softmax(1), len(blocks) - 1
    params = [{n: t if t.requires_grad else t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    boundaries = [str(block.boundary) for block in blocks[:last]]
    env: dict[str, Any] = dict(inputs)
    base: list[Tensors] = []  # the base layers' parameters
    grads: list[Tensors] = []
    local_cotangents: list[Tensor | None] = []  # dl_i/dh_i
    reads: list[Tensors] = []  # the boundaries each block reads
    losses: list[Tensor] = []
    with torch.enable_grad():
        for i, block in enumerate(blocks):
            # One that skipped a block gets a node of its own: its gradient must not come through the blocks between.
            reads.append(
                {
                    n: env[n] if n in boundaries[i - 1 : i] else env[n].view_as(env[n])
                    for n in boundaries[:i]
                    if n in block.inputs
                }
            )
            given, mixture = {**env, **reads[i]}, None if i == last else beta[i]
            exports, local = run_block(block, block.module, params[i], state.buffers[i], mixture, given)
            env |= exports
            loss = local_loss(i, local, target)
            losses.append(loss.detach())
            if i < last:
                h = env[boundaries[i]]
                reached = _reached(h, params[i], stop=reads[i].values())
                heads = {n: t for n, t in params[i].items() if n not in reached}
                dh, *found = gradients(loss, [h, *heads.values()], None, create_graph)
                local_cotangents.append(dh)
                base.append({n: t for n, t in params[i].items() if n in reached})
                grads.append(named(heads, found))
        del local, given, exports

        base.append(params[last])
        grads.append({})
        root: Tensor = loss
        g: Tensor | None = None
        above: Tensors = {}  # dLt_(i+1)/dh for every boundary h alive behind block i
        for i in reversed(range(len(blocks))):
            if i < last:
                root, g = env.pop(boundaries[i]), _combine(p[i], local_cotangents[i], above.pop(boundaries[i], None))
                # A boundary that skips the next block crosses this cut too, and is let through at the same rate.
                above = {n: p[i, 1] * t for n, t in above.items()}
                if g is None:
                    continue
            found = gradients(root, [*base[i].values(), *reads[i].values()], g, create_graph)
            grads[i] |= named(base[i], found)
            for n, t in named(reads[i], found[len(base[i]) :]).items():
                above[n] = above[n] + t if n in above else t
    return RelaxedGradients(grads, losses)


def sgd_momentum_step(
    state: State, grads: Sequence[Tensors], lr: float, momentum: float, weight_decay: float, differentiable: bool
) -> State:
    """One step of `torch.optim.SGD`: m <- momentum * m + g + weight_decay * w, then w <- w - lr * m.

    A parameter without gradient keeps its value and its momentum. If `differentiable`, the result is a new state whose
    tensors carry the graph (and whose buffers are the same objects); otherwise `state` is changed in place.
    """
    if differentiable:
        new = State([dict(d) for d in state.params], state.buffers, [dict(d) for d in state.momentum])
        for params, momenta, found in zip(new.params, new.momentum, grads, strict=True):
            for n, g in found.items():
                momenta[n] = momentum * momenta[n] + torch.add(g, params[n], alpha=weight_decay)
                params[n] = torch.add(params[n], momenta[n], alpha=-lr)
        return new
    names = [(i, n) for i, found in enumerate(grads) for n in found]
    if names:
        with torch.no_grad():
            w, m = [state.params[i][n] for i, n in names], [state.momentum[i][n] for i, n in names]
            torch._foreach_mul_(m, momentum)
            torch._foreach_add_(m, [grads[i][n] for i, n in names])
            torch._foreach_add_(m, w, alpha=weight_decay)
            torch._foreach_add_(w, m, alpha=-lr)
    return state


def run_block(
    block: RelaxedBlock,
    module: nn.Module,
    params: Tensors,
    buffers: Tensors,
    beta: Tensor | None,
    env: Mapping[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Run one block on the values of `env`; return its exports by name and its local output."""
    tensors = {**params, **buffers}
    if beta is not None and block.beta is not None:
        tensors[block.beta] = beta
    if module is not block.module:  # the evaluation graph may lack what only training needs
        own = {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
        tensors = {n: t for n, t in tensors.items() if n in own}
    values, local = functional_call(module, tensors, tuple(env[n] for n in block.inputs))
    exports = dict(zip(block.exports, values, strict=True))
    for name, value in exports.items():
        if carries_gradient(value) and name != block.boundary:
            raise ValueError(f"export {name!r} carries a gradient past the boundary {block.boundary!r}")
    return exports, local


def carries_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that autograd follows."""
    return isinstance(value, Tensor) and value.requires_grad


def _reached(root: Tensor, params: Tensors, stop: Iterable[Tensor]) -> set[str]:
    """Names of the parameters `root` depends on without passing through a tensor of `stop`: the base layer's own."""
    if not root.requires_grad:
        return set()
    edges = {n: get_gradient_edge(t) for n, t in params.items()}  # alive while their nodes are compared
    names = {e.node: n for n, e in edges.items()}
    seen = {get_gradient_edge(t).node for t in stop if t.requires_grad}
    reached: set[str] = set()
    todo = [get_gradient_edge(root).node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in names:
            reached.add(names[node])  # and no further: behind it lie earlier unrolled steps
        else:
            todo += [below for below, _ in node.next_functions if below is not None]
    return reached


def gradients(
    root: Tensor, wanted: Sequence[Tensor], cotangent: Tensor | None, create_graph: bool
) -> list[Tensor | None]:
    """`torch.autograd.grad` that answers `None` wherever there is no gradient to be had."""
    live = [t for t in wanted if t.requires_grad] if root.requires_grad else []
    if not live:
        return [None] * len(wanted)
    found = iter(torch.autograd.grad(root, live, cotangent, create_graph=create_graph, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in wanted]


def _combine(p: Tensor, local: Tensor | None, above: Tensor | None) -> Tensor | None:
    """G = p_isolate * local + p_through * above, where either may be missing."""
    if local is None or above is None:
        return p[1] * above if above is not None else None if local is None else p[0] * local
    return p[0] * local + p[1] * above


def named(names: Iterable[str], values: Iterable[Tensor | None]) -> Tensors:
    """Put names to as many leading values as there are names, and drop those that are `None`."""
    return {n: t for n, t in zip(names, values, strict=False) if t is not None}


def clones(dicts: Sequence[Tensors]) -> list[Tensors]:
    """Copies without graph."""
    return [{n: t.detach().clone() for n, t in d.items()} for d in dicts]
