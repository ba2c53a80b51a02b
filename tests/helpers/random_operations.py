"""What the operations of random programs do, in which dtype, and what they keep for backward; regions and hooks.

Layers have the dtype of what they read; under autocast they stay in float32, and it casts.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from random_instructions import FULL, SINGLE, Hook, Instruction, Kind
from torch import Tensor, nn

CLASSES = 3
INPUT_SHAPES = {"raw": (3, 8, 8), "code": (4,)}

WRITES = ("relu_inplace", "iadd", "imul", "fill", "assign")
"""Operations that overwrite their first argument."""
TENSOR_HOOKS = ("hook", "hook_if_grad", "hook_in_training")
"""Operations that put a hook on their argument, and hand it on."""
KEEPS_ARGUMENTS = ("stem", "encode", "conv", "linear", "batch_norm", "group_norm", "layer_norm", "max_pool", "mul")
KEEPS_ARGUMENTS += ("gate", "masked", "scale", "sin", "chunk", "stack", "logits")
KEEPS_RESULT = ("tanh", "relu", "relu_inplace", "bias")
NEW_VIEWS = ("flatten", "unflatten", "transpose", "unsqueeze", "chunk", "detach")
VIEWS = (*NEW_VIEWS, "first", "second", "identity", "empty", "return", "tick", "tick_in_training", *WRITES)
VIEWS += TENSOR_HOOKS
WITH_LAYER = ("conv", "linear", "batch_norm", "group_norm", "layer_norm", "stem", "encode")
WEIGHTY = ("conv", "linear", "stem", "encode", "stack", "logits")
"""Operations that autocast casts."""
_PROMOTING = ("add", "mul", "cat", "add_bias", "add_token")

PER_CHANNEL = {"image": (4, 1, 1), "flat": (4, 1), "tokens": (4,), "vector": (4,)}
PER_EXAMPLE = {"image": (4, 4, 4), "flat": (4, 16), "tokens": (16, 4), "vector": (4,)}


# ---- regions --------------------------------------------------------------------------------------------------------

REGIONS: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "grad_off": lambda: torch.set_grad_enabled(False),
    "enable": torch.enable_grad,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "full": lambda: torch.autocast("cpu", enabled=False),
}
_CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "full": None}
_GRAD = {"no_grad": False, "grad_off": False, "enable": True}


def cast_of(region: Sequence[str]) -> torch.dtype | None:
    """Return to what autocast casts in a region; None if it does not."""
    return next((_CASTS[name] for name in reversed(region) if name in _CASTS), None)


def records(region: Sequence[str]) -> bool:
    """Whether autograd records in a region."""
    return next((_GRAD[name] for name in reversed(region) if name in _GRAD), True)


def entered(step: Instruction) -> ExitStack:
    """Return a context in which an instruction runs by itself."""
    with ExitStack() as stack:
        for name in step.region:
            stack.enter_context(REGIONS[name]())
        return stack.pop_all()


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def layer_dtype(source: Kind, region: Sequence[str]) -> torch.dtype:
    """Return the dtype of the layer that an instruction calls."""
    return SINGLE if cast_of(region) is not None and source.dtype is not FULL else source.dtype


def result_dtype(op: str, arguments: Sequence[Kind], region: Sequence[str]) -> torch.dtype:
    """Return the dtype of what an operation makes."""
    first, cast = arguments[0].dtype, cast_of(region)
    if op in _PROMOTING:
        return functools.reduce(torch.promote_types, (kind.dtype for kind in arguments))
    if op == "to_like":
        return arguments[1].dtype
    return cast if op in WEIGHTY and cast is not None and first is not FULL else first


# ---- what the operations do -----------------------------------------------------------------------------------------


def layer_of(step: Instruction) -> nn.Module | None:
    """Make the layer that an instruction calls; None if it calls a function."""
    op, source, narrow = step.op, step.source, step.kind.channels
    wide, dtype = source.channels, layer_dtype(source, step.region)
    if op == "linear":
        return nn.Linear(16, 16, dtype=dtype) if source.layout == "flat" else nn.Linear(wide, narrow, dtype=dtype)
    norm = nn.BatchNorm2d if source.layout == "image" else nn.BatchNorm1d
    made: Mapping[str, Callable[[], nn.Module]] = {
        "stem": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, dtype=dtype),
        "encode": lambda: nn.Linear(4, 4, dtype=dtype),
        "conv": lambda: nn.Conv2d(wide, narrow, 3, padding=1, dtype=dtype),
        "batch_norm": lambda: norm(wide, dtype=dtype),
        "group_norm": lambda: nn.GroupNorm(2, wide, dtype=dtype),
        "layer_norm": lambda: nn.LayerNorm(wide, dtype=dtype),
        "relu": nn.ReLU,
        "relu_inplace": lambda: nn.ReLU(inplace=True),
        "dropout": lambda: nn.Dropout(0.3),
        "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
        "identity": nn.Identity,
        "empty": nn.Sequential,
        "stack": lambda: nn.Sequential(
            nn.Linear(wide, wide, dtype=dtype), nn.Tanh(), nn.Linear(wide, wide, dtype=dtype)
        ),
        "logits": lambda: nn.Linear(wide, CLASSES, dtype=dtype),
    }
    return made[op]() if op in made else None


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _imul(x: Tensor) -> Tensor:
    x *= 0.5
    return x


def _fill(x: Tensor) -> Tensor:
    x[:, 0] = 0.5
    return x


def _assign(x: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    if channel_dim == 1:
        x[:, 2:] = y
    else:
        x[..., 2:] = y
    return x


def _tick(x: Tensor, level: Tensor) -> Tensor:
    level.add_(0.25)
    return x


def _hook(x: Tensor) -> Tensor:
    node = x.grad_fn  # of a view that was written to: PyTorch 2.14 crashes if nobody holds it (two linear layers do)
    x.register_hook(half)
    del node
    return x


def _hook_if_grad(x: Tensor) -> Tensor:
    return _hook(x) if x.requires_grad else x


def function_of(step: Instruction) -> Callable[..., Any]:
    """Return what an operation without a layer does. Those that read the model get its tensor as the last argument."""
    source, dtype = step.source, step.kind.dtype
    dim = -1 if source.layout == "tokens" else 1
    functions: Mapping[str, Callable[..., Any]] = {
        "tanh": torch.tanh,
        "sin": lambda x: x.sin(),
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "gate": lambda x, mask: x * mask,
        "compare": lambda x: x > 0,
        "cat": lambda x, y: torch.cat([x, y], dim),
        "chunk": lambda x: x.chunk(2, dim),
        "first": lambda pair: pair[0],
        "second": lambda pair: pair[1],
        "flatten": lambda x: x.flatten(2),
        "unflatten": lambda x: x.unflatten(2, (4, 4)),
        "transpose": lambda x: x.transpose(1, 2),
        "pool": lambda x: x.mean({"image": (2, 3), "flat": 2}.get(source.layout, 1)),
        "unsqueeze": lambda x: x.unsqueeze(1),
        "detach": lambda x: x.detach(),
        "to": lambda x: x.to(dtype),
        "to_like": lambda x, y: x.to(y.dtype),
        "iadd": _iadd,
        "imul": _imul,
        "fill": _fill,
        "assign": functools.partial(_assign, channel_dim=dim),
        "return": lambda x: x,
        "tick": _tick,
        "tick_in_training": _tick,
        "hook": _hook,
        "hook_if_grad": _hook_if_grad,
        "hook_in_training": _hook_if_grad,
        "level": lambda x, level: x + level,
        "masked": lambda x, keep: x * keep,
        "position": lambda x, table: x + table,
        "scale": lambda x, weight: x * weight,
        "bias": lambda table: table.exp(),
        "add_bias": lambda x, bias: x + bias,
        "add_token": lambda x, token: x + token,
    }
    return functions[step.op]


def attribute(step: Instruction) -> str | None:
    """Name the model's own parameter or buffer that an instruction reads directly."""
    layout = step.kind.of or step.source.layout
    if step.op in ("tick", "tick_in_training", "level"):
        return "level"
    names = {"masked": "keep", "position": "position", "scale": "scale", "bias": "scale"}
    if step.op not in names:
        return None
    dtype = step.source.dtype
    return f"{names[step.op]}_{layout}" + ("" if dtype is FULL else f"_{str(dtype).removeprefix('torch.')}")


# ---- hooks ----------------------------------------------------------------------------------------------------------

OBSERVED = Counter[str]()
"""How often the modules with an observing hook were called, by path."""


def half(gradient: Tensor) -> Tensor:
    """Scale a gradient."""
    return 0.5 * gradient


def _scale_result(module: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> Tensor:
    return 0.75 * result


def _shift_argument(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0] + 0.25, *arguments[1:])


def _halve_first(module: nn.Module, of_inputs: tuple[Any, ...], of_results: tuple[Any, ...]) -> tuple[Any, ...]:
    return (0.5 * of_inputs[0], *of_inputs[1:])


def _halve_all(module: nn.Module, of_inputs: tuple[Any, ...], of_results: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if gradient is None else 0.5 * gradient for gradient in of_inputs)


def _halve_results(module: nn.Module, of_results: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(0.5 * gradient for gradient in of_results)


def _halve_own(parameter: Tensor) -> None:
    parameter.grad.mul_(0.5)


def hang(hook: Hook, path: str, module: nn.Module) -> None:
    """Register a hook on a module; `path` is what an observing one counts by."""
    if hook.kind == "observe":
        module.register_forward_hook(lambda module, arguments, result: OBSERVED.update([path]))
    elif hook.kind == "forward":
        module.register_forward_hook(_scale_result)
    elif hook.kind == "pre":
        module.register_forward_pre_hook(_shift_argument)
    elif hook.kind in ("backward", "backward_if"):
        module.register_full_backward_hook(_halve_first if hook.kind == "backward" else _halve_all)
    elif hook.kind == "backward_pre":
        module.register_full_backward_pre_hook(_halve_results)


def hang_on_parameters(hook: Hook, parameters: Iterable[Tensor]) -> None:
    """Register a hook on every one of these parameters that requires a gradient."""
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if hook.kind == "parameter":
            parameter.register_hook(half)
        else:
            parameter.register_post_accumulate_grad_hook(_halve_own)
