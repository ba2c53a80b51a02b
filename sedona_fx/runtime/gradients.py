"""Whether the gradients of a block are finite: one fused check, whose answer may stay on the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from sedona_fx.ir.graph import info, output_node
from sedona_fx.ir.program import attribute


def trained_in(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that require a gradient; one that is used twice may be in the list twice.

    The same as ``module.parameters()``, in a third of the time: it is asked for in every step.
    """
    found: list[nn.Parameter] = []
    modules = [module]
    while modules:
        module = modules.pop()
        found += [p for p in module._parameters.values() if p is not None and p.requires_grad]
        modules += [child for child in module._modules.values() if child is not None]
    return found


def can_train(gm: fx.GraphModule) -> bool:
    """Whether a gradient of something that a block returns could reach one of its parameters that require one.

    It could not if all of these are used under ``torch.no_grad()``, or in front of a ``detach``.
    """
    stack, seen = [output_node(gm.graph)], set[fx.Node]()
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen or not (info(node).is_live or info(node).boundary):
                continue
            seen.add(node)
            stack.append(node)
            if node.op == "call_module" and trained_in(gm.get_submodule(str(node.target))):
                return True
            if node.op == "get_attr" and getattr(attribute(gm, str(node.target)), "requires_grad", False):
                return True
    return False


def not_finite(tensors: list[Tensor]) -> Tensor:
    """Return 1.0 if a number in any of the tensors is infinite or NaN, else 0.0; the host does not wait for it.

    The check is the one of ``torch.amp.GradScaler``, with a scale of one: it reads every number once, allocates
    nothing, and large but finite numbers do not trouble it, as they would a norm.

    Args:
        tensors: at least one, of any shapes and dtypes.

    Returns:
        A float32 scalar on the device of the first tensor.
    """
    device = tensors[0].device
    found = torch.zeros((), device=device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, _one(device))
    except (RuntimeError, NotImplementedError):  # several devices; or complex, sparse or expanded tensors
        parts = [[t for t in tensors if t.device == each] for each in dict.fromkeys(t.device for t in tensors)]
        if len(parts) > 1:
            return torch.stack([not_finite(part).to(device) for part in parts]).amax()
        return torch.stack([(~_numbers(t).isfinite()).any() for t in tensors]).any().float()
    return found


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> tuple[str, float] | None:
    """Return the name of the first tensor that is not finite, and a number in it that is not; None if all are.

    The host waits for every tensor; integers are finite, and so is what has no data (meta).
    """
    for name, tensor in named:
        numbers = _numbers(tensor.detach())
        if not numbers.is_floating_point() or not numbers.numel() or numbers.is_meta:
            continue
        numbers = numbers.float() if numbers.dtype.itemsize == 1 else numbers
        for extreme in torch.aminmax(numbers):  # NaN if there is one
            if not math.isfinite(value := extreme.item()):
                return name, value
    return None


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that these parameters have."""
    return [p.grad for p in parameters if p.grad is not None]


def where_not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[str, float]:
    """Return the last parameter whose gradient is not finite, by name, and a number in the gradient that is not.

    What is not finite spreads towards the input, so that the last one is nearest to where it came from.
    """
    gradients = [(name, p.grad) for name, p in named if p.grad is not None]
    return first_not_finite(reversed(gradients)) or ("", math.nan)


@functools.cache
def _one(device: torch.device) -> Tensor:
    """Return 1.0 on a device: making it anew would take half as long as the check."""
    return torch.ones((), device=device)


def _numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, those that are stored if it is sparse, as real ones."""
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
