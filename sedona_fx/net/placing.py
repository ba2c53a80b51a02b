"""Move the tensors of a net between devices, and keep every graph consistent with that.

Graphs share the model's modules, so a tensor that is replaced inside of a module is replaced for all of them. Tensors
that a graph reads by name (``get_attr`` nodes) are registered in the graph module itself, and so are the constants that
fx makes: code that replaces tensors of the model has to replace these as well (:func:`relink`). Devices that operators
name are part of the graph (:func:`redirect`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import PlanError
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.graph import copy_info, info
from sedona_fx.ir.modules import device_of
from sedona_fx.plan import Plan
from sedona_fx.runtime.block import Block


def relink(
    graphs: Iterable[fx.GraphModule], model: nn.Module, change: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Make every ``get_attr`` node of the graphs read the tensor that the model has now.

    Args:
        graphs: graphs of one net; their modules are changed in place.
        model: the module whose tensors they read.
        change: what was done to the model's tensors (such as a move to a device), to be done to the constants as well,
            which only the graphs hold. None: constants stay as they are.
    """
    changed_by_id: dict[int, Tensor] = {}  # constants that graphs share stay shared
    alive: list[Tensor] = []  # an id identifies an object only while it is alive
    for gm in {id(gm): gm for gm in graphs}.values():
        done: set[str] = set()
        for node in gm.graph.nodes:
            target = str(node.target)
            if node.op != "get_attr" or target in done:
                continue
            done.add(target)
            path, _, name = target.rpartition(".")
            in_graph = gm.get_submodule(path)
            in_model = model.get_submodule(path) if _has_module(model, path) else nn.Module()
            if name in in_model._parameters:
                in_graph._parameters[name] = in_model._parameters[name]
            elif name in in_model._buffers:
                in_graph._buffers[name] = in_model._buffers[name]
            elif change is not None and isinstance(constant := in_graph._buffers.get(name), Tensor):
                alive.append(constant)
                in_graph._buffers[name] = changed_by_id.setdefault(id(constant), change(constant))


def redirect(
    graphs: Iterable[fx.GraphModule], devices: Sequence[torch.device], before: torch.device | Sequence[torch.device]
) -> None:
    """Replace the device that operators name by the device of their block, and move the constants there.

    Captured programs contain such operators (``arange(device=cpu)``). Every graph has constants of its own. Autocast
    regions are about one type of device each: those for the type that the model was traced on follow their block, too.

    Args:
        graphs: graphs of one net, changed in place.
        devices: of the blocks. Nodes that belong to no block count as the first block's.
        before: the device to be replaced, or that of each block; operators that name another one are left alone.
    """

    def moved(value: Any, old: torch.device, new: torch.device) -> Any:
        return pytree.tree_map(lambda leaf: new if leaf == old and isinstance(leaf, torch.device) else leaf, value)

    for gm in {id(gm): gm for gm in graphs}.values():
        changed = False
        for node in gm.graph.nodes:
            record = info(node)
            block = record.block if record.block is not None else 0
            device, old = devices[block], before if isinstance(before, torch.device) else before[block]
            if _is_constant(str(node.target)) and node.op == "get_attr":
                gm._buffers[str(node.target)] = getattr(gm, str(node.target)).to(device)
            if record.region is not None and (region := record.region.moved(old.type, device.type)) != record.region:
                copy_info(node, node, region=region)  # a copy of the net has the same record
                changed = True
            if node.op != "call_function" or record.boundary:
                continue
            args, kwargs = moved(node.args, old, device), moved(node.kwargs, old, device)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs, changed = args, kwargs, True
        if changed:
            gm.recompile()


def copy_on_cpu(gm: fx.GraphModule, devices: Sequence[torch.device]) -> fx.GraphModule:
    """Return a copy of a graph of all blocks that runs on the CPU.

    Args:
        gm: a graph without boundaries.
        devices: of the blocks.
    """
    copied = deep_copy(gm).cpu()
    redirect([copied], [torch.device("cpu")] * len(devices), devices)
    return copied


def block_devices(plan: Plan, model: nn.Module) -> list[torch.device]:
    """Return the device of each block: the plan's, or the model's for all."""
    if plan.devices is not None:
        return [torch.device(name) for name in plan.devices]
    return [device_of(model)] * plan.blocks


def place(blocks: Sequence[Block], model: nn.Module) -> None:
    """Move the tensors of every block to its device. A buffer that several blocks read is moved to the first one's.

    Args:
        blocks: of one net, each with its device.
        model: the module that owns the tensors; they are replaced there too.

    Raises:
        PlanError: blocks on different devices share a parameter.
    """
    first_users: dict[int, Block] = {}
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            user = first_users.setdefault(id(parameter), block)
            if user.device != block.device:
                raise PlanError(
                    f"the parameter {name!r} is shared by block {user.index} on {user.device} and block {block.index} "
                    f"on {block.device}: give both blocks the same device, or cut elsewhere."
                )
    for block in reversed(blocks):
        for name, parameter in list(block.module.named_parameters()):
            moved = parameter.data.to(block.device)
            if torch._has_compatible_shallow_copy_type(parameter.data, moved):
                parameter.data = moved  # with inplace=True it stays the user's own Parameter object
            else:
                replacement = nn.Parameter(moved, requires_grad=parameter.requires_grad)
                _put(name, replacement, (block.module, block.eval_module, model))
        for name, buffer in list(block.module.named_buffers()):
            if _is_constant(name):
                continue
            _put(name, buffer.to(block.device), (block.module, block.eval_module, model))


def _is_constant(name: str) -> bool:
    """Whether this is the name that fx gives to a tensor which the forward pass creates itself."""
    return name.startswith("_tensor_constant")


def _put(name: str, tensor: Tensor, owners: Iterable[nn.Module]) -> None:
    """Replace the parameter or buffer of that name by `tensor` in every owner that has one."""
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
