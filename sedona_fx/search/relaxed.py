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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sedona_fx.search.vjp import Leaf, add, gradients, live, named, own_nodes, reached

LocalLoss = Callable[[int, Any, Any], Tensor]
Batch = tuple[dict[str, Any], Any]
Tensors = dict[str, Tensor]
Slot = tuple[int, str]  # where a state holds a tensor: the block, the name there
_LOSS: Leaf = ("", 0)  # the end of the last block; no value has this name


class RelaxedBlock(Protocol):
    """One base layer of the relaxed net with the mixture of heads behind it (the last one has none).

    `module(*[env[name] for name in inputs])` returns `(exports, local)`. `local` is the softmax(beta)-weighted sum of
    the heads' outputs on the boundary, unscaled; for the last block it is the model's own output. `exports` are the
    values later blocks read, the boundary among them: tensors, or tuples, lists and dicts of tensors, with a gradient
    or without. The heads read no other value with a gradient than the boundary, and share no weight with the base layer
    in front of them. Blocks leave what they read as it is: one that writes in place writes to a copy.
    `eval_module` is the same in evaluation, with the same parameter and buffer names; it may leave the heads out
    (`local` is then read of the last block alone).

    Blocks may share parameters and buffers. A tensor is shared where the modules of two blocks hold the same object;
    its names may differ (an embedding tied to the last layer).
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

    A tensor with several names is held once, with one momentum, by the last block that uses it. `borrowed[i]` says
    where the other names that block i has for such tensors are held; empty: nothing is shared.
    """

    params: list[Tensors]
    buffers: list[Tensors]
    momentum: list[Tensors]
    borrowed: list[dict[str, Slot]] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: Sequence[RelaxedBlock]) -> State:
        """Copy the blocks' parameters and buffers; momentum starts at zero."""
        params, buffers = [Tensors() for _ in blocks], [Tensors() for _ in blocks]
        borrowed = [dict[str, Slot]() for _ in blocks]
        held: dict[Tensor, Slot] = {}

        def hold(dicts: list[Tensors], i: int, name: str, t: Tensor) -> None:
            if t in held:
                borrowed[i][name] = held[t]
            else:
                held[t], dicts[i][name] = (i, name), t.detach().clone()

        for i, b in reversed(list(enumerate(blocks))):
            for n, p in b.module.named_parameters(remove_duplicate=False):
                if p.requires_grad and n != b.beta:
                    hold(params, i, n, p)
            for n, t in b.module.named_buffers(remove_duplicate=False):
                hold(buffers, i, n, t)
        for i, b in enumerate(blocks):  # in evaluation a block may use what only another one uses in training
            for n, t in _tensors(b.eval_module).items():
                if t in held and n not in params[i].keys() | buffers[i].keys():
                    borrowed[i].setdefault(n, held[t])
        return cls(params, buffers, [{n: torch.zeros_like(p) for n, p in d.items()} for d in params], borrowed)

    def clone(self) -> State:
        """Return an independent copy without graph."""
        return replace(self, params=clones(self.params), buffers=clones(self.buffers), momentum=clones(self.momentum))

    def slots(self, dicts: Sequence[Tensors], i: int) -> dict[str, Slot]:
        """Return block i's names for the tensors it uses of `dicts` (params or buffers), and where they are held."""
        borrowed = self.borrowed[i] if self.borrowed else {}
        return {n: (i, n) for n in dicts[i]} | {n: (k, m) for n, (k, m) in borrowed.items() if m in dicts[k]}

    def used(self, dicts: Sequence[Tensors], i: int) -> Tensors:
        """Return the tensors that block i uses of `dicts` (params or buffers), by its own names for them."""
        return {n: dicts[k][m] for n, (k, m) in self.slots(dicts, i).items()}

    @property
    def state_bytes(self) -> int:
        """Bytes held by one copy of this state."""
        dicts = [*self.params, *self.buffers, *self.momentum]
        return sum(t.numel() * t.element_size() for d in dicts for t in d.values())


@dataclass(frozen=True)
class RelaxedGradients:
    """Gradients by block and name, laid out as `State.params` (a parameter that gets none is absent); and the B losses.

    The losses are the local ones, detached scalars.
    """

    grads: list[Tensors]
    losses: list[Tensor]


@dataclass(frozen=True)
class _Stretch:
    """A block as the way down needs it: where its part of the graph ends and where it starts."""

    made: dict[Leaf, Tensor]  # its live exports; of the last block, the loss
    local: dict[Leaf, Tensor]  # dl_i/dh_i
    read: dict[Leaf, Tensor]  # live exports of earlier blocks, by nodes of its own
    weights: dict[Slot, Tensor]  # those that `made` depends on (not the heads'), by nodes of its own

    def descend(self, above: dict[Leaf, Tensor], create_graph: bool) -> dict[Slot, Tensor]:
        """Take the cotangents of what this block made out of `above`, put in those of what it read.

        Returns the gradients of the block's weights.
        """
        roots = {leaf: t for leaf, t in self.made.items() if leaf in above}
        cotangents = [above.pop(leaf) for leaf in roots]
        found = gradients([*roots.values()], [*self.weights.values(), *self.read.values()], cotangents, create_graph)
        add(above, named(self.read, found[len(self.weights) :]))
        return named(self.weights, found)


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

    Raises:
        ValueError: a head uses a weight of the base layer in front of it. Its two gradients have different rates, and
            one walk cannot tell them apart.
    """
    if not create_graph:
        alpha, beta = alpha.detach(), [b.detach() for b in beta]
    p, last = alpha.softmax(1), len(blocks) - 1
    held = [{n: t if t.requires_grad else t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
    env: dict[str, Any] = {}  # the exports of the blocks so far
    grads: dict[Slot, Tensor] = {}
    losses: list[Tensor] = []

    def ascend(i: int) -> _Stretch:
        """Run block i and take its local loss, and of that the gradients at the boundary and of the heads."""
        block = blocks[i]
        given = {n: own_nodes(env[n]) for n in block.inputs if n in env}
        slots = state.slots(state.params, i)
        weights: dict[Slot, Tensor] = {(k, n): own_nodes(held[k][n]) for k, n in dict.fromkeys(slots.values())}
        tensors = {n: weights[slot] for n, slot in slots.items()} | state.used(state.buffers, i)
        mixture = None if i == last else beta[i]
        exports, output = run_block(block, block.module, tensors, mixture, {**inputs, **given})
        loss = local_loss(i, output, target)
        losses.append(loss.detach())
        read = live(given)
        if i == last:
            return _Stretch({_LOSS: loss}, {}, read, weights)
        env.update(exports)
        made, ends = live(exports), live({str(block.boundary): exports[str(block.boundary)]})
        base = reached(made.values(), weights, stop=read.values())
        headed = reached([loss], weights, stop=ends.values())
        if both := base & headed:
            names = ", ".join(n for n, slot in slots.items() if slot in both)
            raise ValueError(
                f"block {i}: its heads depend on {names} other than through the boundary {block.boundary!r}"
            )
        heads = {slot: t for slot, t in weights.items() if slot not in base}
        found = gradients([loss], [*ends.values(), *heads.values()], None, create_graph)
        add(grads, named(heads, found[len(ends) :]))
        return _Stretch(made, named(ends, found), read, {slot: t for slot, t in weights.items() if slot in base})

    with torch.enable_grad():
        stretches = [ascend(i) for i in range(len(blocks))]
        env.clear()
        above = {_LOSS: torch.ones_like(losses[last])}  # dLt_(i+1)/dv for every live value v that crosses cut i
        for i in reversed(range(len(blocks))):
            stretch = stretches.pop()  # so that what lies above it is freed
            if i < last:
                above = {leaf: p[i, 1] * t for leaf, t in above.items()}
                add(above, {leaf: p[i, 0] * t for leaf, t in stretch.local.items()})
            add(grads, stretch.descend(above, create_graph))
    by_block = [Tensors() for _ in blocks]
    for (k, n), t in grads.items():
        by_block[k][n] = t
    return RelaxedGradients(by_block, losses)


def sgd_momentum_step(
    state: State, grads: Sequence[Tensors], lr: float, momentum: float, weight_decay: float, differentiable: bool
) -> State:
    """One step of `torch.optim.SGD`: m <- momentum * m + g + weight_decay * w, then w <- w - lr * m.

    A parameter without gradient keeps its value and its momentum. If `differentiable`, the result is a new state whose
    tensors carry the graph (and whose buffers are the same objects); otherwise `state` is changed in place.
    """
    if differentiable:
        new = replace(state, params=[dict(d) for d in state.params], momentum=[dict(d) for d in state.momentum])
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
    block: RelaxedBlock, module: nn.Module, tensors: Tensors, beta: Tensor | None, env: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Run one block on the values of `env`; return its exports by name and its local output.

    `tensors` are its parameters and buffers; those that `module`, the block's or its eval module, lacks are left out.
    """
    if beta is not None and block.beta is not None:
        tensors = {**tensors, block.beta: beta}
    own = _tensors(module)
    given = {n: t for n, t in tensors.items() if n in own}
    values, local = functional_call(module, given, tuple(env[n] for n in block.inputs))
    return dict(zip(block.exports, values, strict=True)), local


def _tensors(module: nn.Module) -> Tensors:
    """Return a module's parameters and buffers under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def clones(dicts: Sequence[Tensors]) -> list[Tensors]:
    """Copies without graph."""
    return [{n: t.detach().clone() for n, t in d.items()} for d in dicts]
