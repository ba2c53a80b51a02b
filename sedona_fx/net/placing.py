"""Where the tensors of a net live, and that every graph sees them there.

Graphs share the model's modules, but what they read by name (``get_attr``) they hold themselves: whoever replaces a
tensor of the model shows it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError
from sedona_fx.ir.graph import info
from sedona_fx.runtime.block import Block


def relink(
    graphs: Iterable[fx.GraphModule], model: nn.Module, change: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Let every ``get_attr`` of the graphs read the model's present tensor.

    Args:
        graphs: of one net.
        model: the module whose tensors they read.
        change: what was done to the model's tensors, for constants, which only the graphs hold.
    """
    changed: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # an id names an object only while it lives
    for gm in {id(gm): gm for gm in graphs}.values():
        done: set[str] = set()
        for node in gm.graph.nodes:
            target = str(node.target)
            if node.op != "get_attr" or target in done:
                continue
            done.add(target)
            path, _, name = target.rpartition(".")
            ours = gm.get_submodule(path)
            theirs = model.get_submodule(path) if _has_module(model, path) else nn.Module()
            if name in theirs._parameters:
                ours._parameters[name] = theirs._parameters[name]
            elif name in theirs._buffers:
                ours._buffers[name] = theirs._buffers[name]
            elif change is not None and isinstance(constant := ours._buffers.get(name), Tensor):
                kept.append(constant)
                ours._buffers[name] = changed.setdefault(id(constant), change(constant))


def redirect(graphs: Iterable[fx.GraphModule], devices: Sequence[torch.device], before: torch.device) -> None:
    """Let operators that name a device (``arange(device=cpu)``, as captured programs have them) name their block's.

    The constants of a graph are moved as well: each graph has its own.
    """

    def moved(value: Any, device: torch.device) -> Any:
        return pytree.tree_map(
            lambda leaf: device if leaf == before and isinstance(leaf, torch.device) else leaf, value
        )

    for gm in {id(gm): gm for gm in graphs}.values():
        changed = False
        for node in gm.graph.nodes:
            record = info(node)
            device = devices[record.block if record.block is not None else 0]
            if _is_constant(str(node.target)) and node.op == "get_attr":
                gm._buffers[str(node.target)] = getattr(gm, str(node.target)).to(device)
            if node.op != "call_function" or record.boundary:
                continue
            args, kwargs = moved(node.args, device), moved(node.kwargs, device)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs, changed = args, kwargs, True
        if changed:
            gm.recompile()


def place(blocks: Sequence[Block], model: nn.Module) -> None:
    """Move the tensors of every block to its device. What several blocks read lives with the first of them.

    Raises:
        PlanError: a parameter of blocks on different devices.
    """
    homes: dict[int, Block] = {}
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            home = homes.setdefault(id(parameter), block)
            if home.device != block.device:
                raise PlanError(
                    f"the parameter {name!r} is shared by block {home.index} on {home.device} and block {block.index} "
                    f"on {block.device}: give both blocks the same device, or cut elsewhere."
                )
    for block in reversed(blocks):
        for name, parameter in list(block.module.named_parameters()):
            moved = parameter.data.to(block.device)
            if torch._has_compatible_shallow_copy_type(parameter.data, moved):
                parameter.data = moved  # the object stays the user's, with inplace=True
            else:
                replacement = nn.Parameter(moved, requires_grad=parameter.requires_grad)
                _put(name, replacement, (block.module, block.eval_module, model))
        for name, buffer in list(block.module.named_buffers()):
            if _is_constant(name):
                continue
            _put(name, buffer.to(block.device), (block.module, block.eval_module, model))


def _is_constant(name: str) -> bool:
    """Whether fx gave a tensor that the forward makes from nothing this name."""
    return name.startswith("_tensor_constant")


def _put(name: str, tensor: Tensor, owners: Iterable[nn.Module]) -> None:
    """Register a tensor in the place of the one of that name, wherever there is one."""
    path, _, leaf = name.rpartition(".")
    for owner in owners:
        if _has_module(owner, path):
            module = owner.get_submodule(path)
            for registry in (module._parameters, module._buffers):
                if leaf in registry:
                    registry[leaf] = tensor  # type: ignore[assignment]


def _has_module(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
