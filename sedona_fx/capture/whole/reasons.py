"""Why code cannot be recorded: what it is that needs tensors with numbers, and which module could be kept whole."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch import nn

from sedona_fx.errors import TraceError

BACKWARD = (
    "it calls backward(), which adds to the .grad of tensors, and a graph only computes values; torch.autograd.grad "
    "returns the gradient as one"
)
"""Why a forward that calls ``backward`` cannot be recorded."""

GRAD = "torch.autograd.grad needs a graph of autograd, and torch.export keeps none"
"""Why ``torch.export`` cannot record a derivative."""

METHOD = "it calls a method of a TorchScript module other than by calling the module"
"""Why a call of a method of TorchScript is not recorded."""

TRANSFORM = "a transform such as torch.vmap runs a function on tensors of its own, and no block can run a part of that"
"""Why a program with a part of a transform in it is refused."""

_TORCH = os.path.dirname(torch.__file__)
_TRANSFORMS = os.path.join(_TORCH, "_functorch", "")
_EXPORTS_OWN = os.path.join(_TRANSFORMS, "_aot_autograd", "")
_FUNCTIONAL = os.path.join(_TORCH, "autograd", "functional.py")
_NAMES = {
    "vmap": "torch.vmap",
    **{
        name: f"torch.func.{name}" for name in ("grad", "grad_and_value", "vjp", "jvp", "jacrev", "jacfwd", "linearize")
    },
}
_NO_NUMBERS = "and there are none while a forward is recorded"


class NeedsTensors(TraceError):
    """Code that neither front end can record, but that runs in a module which is kept whole.

    Attributes:
        path: of the innermost module whose code it is; empty for the model's own forward.
    """

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self.path = path


class Undecided(NeedsTensors):
    """Code that decides by numbers in tensors, or by random ones: a graph would keep what was decided for ever.

    It runs as Python in a module that is kept whole, in every step anew.
    """


def asks_for_numbers(error: BaseException | None) -> bool:
    """Whether ``torch.export`` failed because Python code asked for a number in a tensor."""
    kinds = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
    while error is not None:
        if not kinds.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def is_opaque(error: BaseException) -> bool:
    """Whether an error was raised by code that has to run on real tensors: a transform, or ``backward``."""
    return bool(_transform(error)) or str(error) in (BACKWARD, GRAD, METHOD)


def reason_of(error: BaseException) -> str:
    """Return in a few words why a forward could not be recorded."""
    if function := _transform(error):
        return f"{function} needs tensors with numbers, {_NO_NUMBERS}"
    if asks_for_numbers(error):
        return f"Python code asks for a number in a tensor, {_NO_NUMBERS}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    if "__cuda_array_interface__" in reason:  # PyTorch tried to read the proxy as an array of numbers
        return f"it needs the numbers in a tensor, {_NO_NUMBERS}"
    if "InplaceProxy" in str(error):
        return f"it calls compiled code, which takes tensors with numbers, {_NO_NUMBERS}"
    return reason


def module_of(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost module of a model whose own code an error came from; ``""`` for the model.

    Layers that run inside of a transform are not asked: it is the module that calls the transform.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    innermost = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file == _FUNCTIONAL or (file.startswith(_TRANSFORMS) and not file.startswith(_EXPORTS_OWN)):
            break
        innermost = paths.get(id(frame.f_locals.get("self")), innermost)
    return innermost


def is_transform(target: Any) -> bool:
    """Whether a call in an exported program belongs to a transform of ``torch.func``.

    Such calls change a state of the interpreter that the calls after them rely on.
    """
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


def _transform(error: BaseException) -> str:
    """Return the function of ``torch.func`` or ``torch.autograd.functional`` whose code raised an error, or ``""``."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename == _FUNCTIONAL and not code.co_name.startswith("_"):
            return f"torch.autograd.functional.{code.co_name}"
        if code.co_filename.startswith(_TRANSFORMS) and (name := _NAMES.get(code.co_qualname.partition(".")[0])):
            return name
    return ""
