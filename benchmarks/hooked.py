"""What each block's gradient must be, from the user's own model: nothing detached, no code of sedona_fx in its forward.

Forward hooks on the modules that the cuts are named by see the boundary values go by and clone them (so that in-place
operations behind them spoil nothing); a head gives a local loss on each clone, and ``autograd.grad`` of local loss i is
taken on the parameters of block i alone. A parameter that several blocks use is replaced, use by use, by a leaf of its
own with the same numbers; a use belongs to the first block whose loss depends on it, and the gradient is the sum over
the uses.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from trees import call

import sedona_fx
from sedona_fx.train import block_seed

Loss = Callable[[Any, Any], Tensor]
Gradients = dict[str, Tensor]


class Only(dict[Any, Any]):
    """What a loss sees of a head: one field of the model's output, by key or as an attribute; the others are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def seen_by_loss(output: Any, key: Any, primary: Tensor) -> Any:
    """Return a head's output in the form of the model's, for the loss."""
    if isinstance(output, Tensor) or hasattr(output, "_fields"):
        return primary
    if isinstance(output, (list, tuple)):
        return [primary if index == (key or 0) else None for index in range(len(output))]
    return Only({key or ("logits" if hasattr(output, "logits") else next(iter(output))): primary})


def whole_loss(loss: Loss, output: Any, target: Any) -> Tensor:
    """Return what plain PyTorch trains a model by: auxiliary classifiers in a named tuple count 0.3 each."""
    if not hasattr(output, "_fields"):
        return loss(output, target)
    main, *auxiliary = output
    total = loss(main, target)
    for one in auxiliary:
        total = total + 0.3 * loss(one, target)
    return total


def tensor_modules(model: nn.Module, inputs: Any, paths: Sequence[str]) -> list[str]:
    """Return those of the module paths that run exactly once and return one tensor, in the order they end."""
    calls, order, bad = Counter[str](), list[str](), set[str]()
    known = dict(model.named_modules())

    def seen(path: str, value: Any) -> None:
        calls[path] += 1
        order.append(path)
        if not isinstance(value, Tensor):
            bad.add(path)

    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            if path and path in known:
                handle = known[path].register_forward_hook(lambda _m, _i, out, path=path: seen(path, out))
                hooks.callback(handle.remove)
        call(model, inputs)
    return [path for path in order if calls[path] == 1 and path not in bad]


def reference_gradients(
    model: nn.Module, net: sedona_fx.Net, inputs: Any, target: Any, loss: Loss
) -> tuple[list[Tensor], Gradients]:
    """Return the K local losses and the gradient of every parameter, by name (of heads: ``"heads."``).

    Args:
        model: equal to the model the net was made of; only this one runs. It is not changed.
        net: says where the cuts are, which parameters are in which block, and what the heads are (they are copied).
        inputs: one batch.
        target: for the loss.
        loss: of the whole and of each block.
    """
    model, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    key, seed = net.plan.output, net.plan.seed
    shared = _used_by_several(net)
    values: list[Tensor] = []

    def reach(value: Tensor) -> None:
        values.append(value.clone())
        torch.manual_seed(block_seed(seed, len(values), net.steps))

    with ExitStack() as hooks:
        uses = _leaf_by_use(model, shared, hooks)
        for path in net.plan.cuts:
            handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, out: reach(out))
            hooks.callback(handle.remove)
        torch.manual_seed(block_seed(seed, 0, net.steps))
        output = call(model, inputs)
    losses = [loss(seen_by_loss(output, key, heads[str(k)](value)), target) for k, value in enumerate(values)]
    losses.append(whole_loss(loss, output, target))
    if len(losses) != len(net.blocks):
        raise AssertionError(f"{len(losses) - 1} boundaries went by, the net has {len(net.blocks) - 1}")

    total: Gradients = {}
    for block, value in zip(net.blocks, losses, strict=True):
        inside = {id(p) for p in block.parameters()}
        names = [
            name
            for name, p in net.model.named_parameters()
            if id(p) in inside and name not in shared and p.requires_grad
        ]
        owned: dict[str, Tensor] = {name: model.get_parameter(name) for name in names}
        if block.head is not None:
            owned |= {f"heads.{block.index}.{n}": p for n, p in heads[str(block.index)].named_parameters()}
        if not owned:  # nothing but shared parameters
            continue
        found = torch.autograd.grad(value, list(owned.values()), retain_graph=True, allow_unused=True)
        total |= {name: gradient for name, gradient in zip(owned, found, strict=True) if gradient is not None}
    for name, leaf in uses:
        gradients = (torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)[0] for loss in losses)
        first = next((gradient for gradient in gradients if gradient is not None), None)
        if first is not None:
            total[name] = total[name] + first if name in total else first
    return [value.detach() for value in losses], total


def net_gradients(net: sedona_fx.Net) -> Gradients:
    """Return what ``net.backward`` left in ``.grad``, in the form of :func:`reference_gradients`."""
    named = [*net.model.named_parameters(), *((f"heads.{n}", p) for n, p in net.heads.named_parameters())]
    return {name: p.grad for name, p in named if p.grad is not None}


def by_block(net: sedona_fx.Net, gradients: Mapping[str, Tensor]) -> list[Gradients]:
    """Sort gradients by the block that they belong to; a shared parameter is in each block that uses it."""
    names = {id(p): name for name, p in net.model.named_parameters()}
    names |= {id(p): f"heads.{name}" for name, p in net.heads.named_parameters()}
    return [
        {name: gradients[name] for name in (names[id(p)] for p in block.parameters()) if name in gradients}
        for block in net.blocks
    ]


def _used_by_several(net: sedona_fx.Net) -> set[str]:
    uses = Counter(id(p) for block in net.blocks for p in {id(p): p for p in block.module.parameters()}.values())
    return {name for name, p in net.model.named_parameters() if uses[id(p)] > 1 and p.requires_grad}


def _leaf_by_use(model: nn.Module, names: set[str], hooks: ExitStack) -> list[tuple[str, nn.Parameter]]:
    """Put a fresh leaf in the place of a shared parameter whenever a module that holds it runs; return them, by name.

    The list fills while the model runs. It starts with the parameters themselves, for whoever reads them elsewhere.
    """
    wanted = {id(p): name for name, p in model.named_parameters() if name in names}
    uses = [(name, model.get_parameter(name)) for name in wanted.values()]

    def renew(module: nn.Module, name: str, attribute: str) -> None:
        leaf = nn.Parameter(getattr(module, attribute).detach().clone())
        module._parameters[attribute] = leaf
        uses.append((name, leaf))

    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                name = wanted[id(parameter)]
                handle = module.register_forward_pre_hook(
                    lambda _m, _i, module=module, name=name, attribute=attribute: renew(module, name, attribute)
                )
                hooks.callback(handle.remove)
    return uses
