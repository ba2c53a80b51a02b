"""The relaxed net's blocks, and everything that a training step of it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

LocalLoss = Callable[[int, Any, Any], Tensor]
Tensors = dict[str, Tensor]
Slot = tuple[int, str]  # where a state holds a tensor: the block, the name there


class RelaxedBlock(Protocol):
    """One base layer of the relaxed net with the mixture of heads behind it (the last one has none).

    `module(*[env[name] for name in inputs])` returns `(exports, local)`. `local` is the softmax(beta)-weighted sum of
    the heads' outputs on the boundary, unscaled; for the last block it is the model's own output. `exports` are the
    values later blocks read, the boundary among them: tensors, or tuples, lists and dicts of tensors, with a gradient
    or without. The heads read no other value with a gradient than the boundary, and share no weight with the base layer
    in front of them. Blocks leave what they read as it is: one that writes in place writes to a copy.
    `eval_module` is the same in evaluation, with the same parameter and buffer names; it may leave the heads out
    (`local` is then read of the last block alone). `trunk` is `module` without heads, for who needs no local loss (its
    `local` is not read); None: there is none, and `module` serves.

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
    @property
    def trunk(self) -> nn.Module | None: ...  # noqa: D102


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
            for n, t in named_tensors(b.eval_module).items():
                if t in held and n not in params[i].keys() | buffers[i].keys():
                    borrowed[i].setdefault(n, held[t])
        return cls(params, buffers, [{n: torch.zeros_like(p) for n, p in d.items()} for d in params], borrowed)

    def clone(self) -> State:
        """Return an independent copy without graph."""
        return replace(self, params=clones(self.params), buffers=clones(self.buffers), momentum=clones(self.momentum))

    def fields(self) -> dict[str, Any]:
        """Return the fields by name, as plain dictionaries and lists of tensors; ``State(**fields)`` is this again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

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


def named_tensors(module: nn.Module) -> Tensors:
    """Return a module's parameters and buffers under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def clones(dicts: Sequence[Tensors]) -> list[Tensors]:
    """Copies without graph."""
    return [{n: t.detach().clone() for n, t in d.items()} for d in dicts]
