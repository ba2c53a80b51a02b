"""The relaxed net, and everything that a training step of it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.whole.late_buffers import late_buffers
from sedona_fx.ir.graph import info

BlockLossFunction = Callable[[int, Any, Any], Tensor]
"""``loss(block index, local output, target)``: the local loss of one block, a scalar."""

Tensors = dict[str, Tensor]

Slot = tuple[int, str]
"""Where a :class:`State` holds a tensor: the index of the block, and the tensor's name there."""


class RelaxedBlock(Protocol):
    """One base layer of the relaxed net with its mixture of candidate heads; the last block has no heads.

    ``module(*[env[name] for name in inputs])`` returns ``(exports, local)``:

    - `exports` are the values that later blocks read, the boundary among them: tensors, or tuples, lists and dicts of
      tensors, with a gradient or without.
    - `local` is the softmax(beta)-weighted sum of the heads' outputs on the boundary, unscaled by alpha; of the last
      block, the model's own output.

    Of the values that carry a gradient, heads read the boundary alone, and they share no weight with their own base
    layer. A block leaves what it reads unchanged: one that works in place writes to a copy.

    Blocks may share parameters and buffers. A tensor is shared where the modules of two blocks hold the same object;
    its names may differ (an embedding tied to the last layer).

    Attributes:
        module: the block in training.
        eval_module: the block in evaluation, with the same names of parameters and buffers. It may leave out the heads:
            in evaluation `local` is read from the last block alone.
        inputs: names of the values that it reads.
        exports: names of the values that it makes.
        boundary: the export that the heads read; None for the last block.
        beta: name of the parameter with the heads' logits; None for the last block.
        trunk: `module` without heads, for steps that need no local loss of this block; its `local` is not read. None:
            there is no such module, and `module` runs instead.
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
    @property
    def trunk(self) -> nn.Module | None: ...  # noqa: D102


@dataclass(frozen=True)
class RelaxedNet:
    """The relaxed net: its B base layers in order, and the loss that each of them is trained by."""

    blocks: Sequence[RelaxedBlock]
    local_loss: BlockLossFunction

    @functools.cached_property
    def derives(self) -> bool:
        """Whether a forward pass takes derivatives, so that second derivatives of the net need third ones."""
        graphs = [b.module.graph for b in self.blocks if isinstance(b.module, fx.GraphModule)]
        return any(node.target is torch.autograd.grad or info(node).derives for g in graphs for node in g.nodes)


@dataclass(frozen=True)
class Logits:
    """What the search learns.

    Attributes:
        alpha: (B-1, 2), for each cut: isolate, let through.
        beta: B-1 tensors (M_i,), one logit per candidate head of the cut.
    """

    alpha: Tensor
    beta: Sequence[Tensor]

    def tensors(self) -> list[Tensor]:
        """Return alpha and then every beta."""
        return [self.alpha, *self.beta]

    def detached(self, requires_grad: bool = False) -> Logits:
        """Return the same values cut off from any graph; with `requires_grad`, as leaves of a new one."""
        alpha, *beta = (t.detach().requires_grad_(requires_grad) for t in self.tensors())
        return Logits(alpha, beta)


@dataclass
class State:
    """Everything that a training step of the relaxed net changes: one dictionary per block, by name.

    A tensor that has several names is held once, with one momentum, by the last block that uses it. No tensor carries a
    graph.

    Attributes:
        params: trainable parameters, those of the heads included, beta left out. Frozen parameters are not here: they
            stay the module's own.
        buffers: buffers.
        momentum: of SGD, laid out as `params`.
        borrowed: per block, its further names of tensors that are held elsewhere or under another name, and where.
            Empty: nothing is shared.
        late: per block, the names of buffers that get their size in the first forward pass.
    """

    params: list[Tensors]
    buffers: list[Tensors]
    momentum: list[Tensors]
    borrowed: list[dict[str, Slot]] = field(default_factory=list)
    late: list[list[str]] = field(default_factory=list)

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

        for i, block in reversed(list(enumerate(blocks))):
            for name, parameter in block.module.named_parameters(remove_duplicate=False):
                if parameter.requires_grad and name != block.beta:
                    hold(params, i, name, parameter)
            for name, buffer in block.module.named_buffers(remove_duplicate=False):
                hold(buffers, i, name, buffer)
        for i, block in enumerate(blocks):  # in evaluation a block may use what only another block uses in training
            for name, t in named_tensors(block.eval_module).items():
                if t in held and name not in params[i].keys() | buffers[i].keys():
                    borrowed[i].setdefault(name, held[t])
        late = [sorted(late_buffers(block.module)) for block in blocks]
        return cls(params, buffers, [{n: torch.zeros_like(p) for n, p in d.items()} for d in params], borrowed, late)

    def clone(self) -> State:
        """Return an independent copy."""
        return replace(self, params=clones(self.params), buffers=clones(self.buffers), momentum=clones(self.momentum))

    def require_like(self, other: State | None) -> None:
        """Check that this state has the names, shapes and dtypes of another one of the same net.

        Buffers that get their size in the first forward pass may have another one.

        Raises:
            ValueError: it has not.
        """

        def layout(state: State) -> Any:
            dicts = (state.params, state.buffers, state.momentum)
            late = {(i, n) for s in (self, other) if s is not None for i, names in enumerate(s.late) for n in names}

            def of(i: int, name: str, t: Tensor) -> Any:
                return (None if (i, name) in late else tuple(t.shape)), t.dtype

            described = [[{n: of(i, n, t) for n, t in d.items()} for i, d in enumerate(each)] for each in dicts]
            return described, state.borrowed

        if other is not None and layout(self) != layout(other):
            raise ValueError("its weights, buffers or momenta are not those of this net")

    def fields(self) -> dict[str, Any]:
        """Return the fields by name, as plain dictionaries and lists of tensors; ``State(**fields)`` restores them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def slots(self, dicts: Sequence[Tensors], i: int) -> dict[str, Slot]:
        """Return block i's names for the tensors it uses of `dicts` (params or buffers), and where each is held."""
        borrowed = self.borrowed[i] if self.borrowed else {}
        return {n: (i, n) for n in dicts[i]} | {n: (k, m) for n, (k, m) in borrowed.items() if m in dicts[k]}

    def used(self, dicts: Sequence[Tensors], i: int) -> Tensors:
        """Return the tensors that block i uses of `dicts` (params or buffers), by its own names for them."""
        return {n: dicts[k][m] for n, (k, m) in self.slots(dicts, i).items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of one copy of this state."""
        dicts = [*self.params, *self.buffers, *self.momentum]
        return sum(t.numel() * t.element_size() for d in dicts for t in d.values())


@torch.no_grad()
def sgd_momentum_step(
    state: State, grads: Sequence[Tensors], *, lr: float, momentum: float, weight_decay: float, in_place: bool
) -> State:
    """Take one step of `torch.optim.SGD`: m <- momentum * m + g + weight_decay * w, then w <- w - lr * m.

    Args:
        state: weights and momentum before the step.
        grads: gradients, laid out as `state.params`. A parameter without one keeps its value and its momentum.
        lr: learning rate.
        momentum: factor of the previous momentum.
        weight_decay: added to the gradient, times the weight.
        in_place: change `state` and return it. If not, return a new state; its buffers, and the tensors that did not
            move, are the same objects as in `state`.
    """
    if not in_place:
        new = replace(state, params=[dict(d) for d in state.params], momentum=[dict(d) for d in state.momentum])
        for params, momenta, block_grads in zip(new.params, new.momentum, grads, strict=True):
            for n, g in block_grads.items():
                momenta[n] = momentum * momenta[n] + torch.add(g, params[n], alpha=weight_decay)
                params[n] = torch.add(params[n], momenta[n], alpha=-lr)
        return new
    slots = [(i, n) for i, block_grads in enumerate(grads) for n in block_grads]
    if slots:
        w, m = [state.params[i][n] for i, n in slots], [state.momentum[i][n] for i, n in slots]
        torch._foreach_mul_(m, momentum)
        torch._foreach_add_(m, [grads[i][n] for i, n in slots])
        torch._foreach_add_(m, w, alpha=weight_decay)
        torch._foreach_add_(w, m, alpha=-lr)
    return state


def named_tensors(module: nn.Module) -> Tensors:
    """Return a module's parameters and buffers under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def clones(dicts: Sequence[Tensors]) -> list[Tensors]:
    """Return copies without graph."""
    return [{n: t.detach().clone() for n, t in d.items()} for d in dicts]


def leaves(dicts: Sequence[Tensors]) -> list[Tensors]:
    """Return the same values as leaves of a new graph, that gradients can be taken of. Nothing is copied."""
    return [{n: t.detach().requires_grad_() for n, t in d.items()} for d in dicts]


def by_slot(dicts: Sequence[Tensors]) -> dict[Slot, Tensor]:
    """Return the tensors of all blocks in one dictionary."""
    return {(i, n): t for i, d in enumerate(dicts) for n, t in d.items()}
