"""The copy of the user's model that a net owns: with the hooks on its parameters, and with no way back to the original.

``copy.deepcopy`` drops hooks that hang on parameters, and it does not copy functions: a function among the attributes
of a module (``m.layer.forward = lambda h: ...``) is the same one in the copy, and whatever it reaches by its closure or
by a global name is the original, whose weights no net would train.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
from collections import deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.scripted import copied_right
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.copies import copied_anyway, uncopyable
from sedona_fx.ir.modules import share_copy, unwrapped
from sedona_fx.net.net import Net
from sedona_fx.net.parallel import warn_of_replicas

_INTERNALS = frozenset(vars(nn.Module()))
_MOST = 200_000
"""Objects that are looked at behind one function, the nearest first."""


def owned_copy(model: nn.Module, *, inplace: bool) -> nn.Module:
    """Return the copy of the model that the net will own; with `inplace` it shares the tensors.

    Of a wrapped model it is the model inside (:func:`~sedona_fx.ir.modules.unwrapped`).

    Raises:
        DataError: `model` is not a module, has parameters without a shape, or cannot be copied.
        TraceError: a function among the attributes of the copy would use layers of the original.
    """
    if not isinstance(model, nn.Module):
        raise DataError(
            f"decouple takes an nn.Module, not {type(model).__name__}. Wrap a function in a module whose forward calls "
            "it."
        )
    warn_of_replicas(model)
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise DataError(
            "the model is TorchScript, which has no Python code to record: decouple the nn.Module that it was made of. "
            "Parts of a model may be TorchScript."
        )
    if isinstance(model, Net):
        raise DataError("the model is a net already: decouple the model that it holds, decouple(net.model, ...).")
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := next((name for name, tensor in tensors if nn.parameter.is_lazy(tensor)), None):
        raise DataError(
            f"{lazy!r} of {type(model).__name__} is lazy: it gets its shape when the model first runs, and an "
            "optimizer needs it before. Run the model once on a batch, model(x), and decouple it then."
        )
    try:
        with copied_right(model):
            owned: nn.Module = share_copy(model) if inplace else _copied(model)
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}).") from error
    _check_functions(model, owned)
    _name_arguments(owned)
    if not inplace:
        _copy_hooks(model, owned)
    return owned


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of the model.

    Raises:
        DataError: something in it cannot be copied; names its place.
    """
    with copied_anyway():
        try:
            return copy.deepcopy(model)
        except Exception as error:
            for path, value, reason in uncopyable(model):
                raise DataError(
                    f"{path or 'the model itself'!r} of {type(model).__name__}, a {type(value).__name__}, cannot be "
                    f"copied ({type(reason).__name__}: {reason}), and the net owns a copy of the model. Make it where "
                    "it is needed, outside of the attributes, or decouple(..., inplace=True): then the net shares it, "
                    "and the parameters, with your model."
                ) from error
            raise


def _name_arguments(owned: nn.Module) -> None:
    """Let a forward with positional-only arguments, ``forward(x, /)``, take them by name as well, in the copy alone."""
    if "forward" in vars(owned):
        return
    signature = inspect.signature(type(owned).forward)
    parameters = list(signature.parameters.values())
    if not any(p.kind is p.POSITIONAL_ONLY for p in parameters[1:]):
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        positional = list(args)
        missing = parameters[1 + len(args) :]
        for parameter in itertools.takewhile(lambda p: p.kind is p.POSITIONAL_ONLY, missing):
            if parameter.name not in kwargs and parameter.default is parameter.empty:
                break  # Python says what is missing
            positional.append(kwargs.pop(parameter.name, parameter.default))
        return type(self).forward(self, *positional, **kwargs)

    named = [
        p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY and k else p
        for k, p in enumerate(parameters)
    ]
    if parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        named[0] = parameters[0]
    vars(forward)["__signature__"] = signature.replace(parameters=named)
    owned.forward = MethodType(forward, owned)


def _copy_hooks(model: nn.Module, owned: nn.Module) -> None:
    """Put the hooks of the parameters on their copies."""
    for original, parameter in zip(model.parameters(), owned.parameters(), strict=True):
        for hook in (original._backward_hooks or {}).values():
            if parameter.requires_grad:
                parameter.register_hook(hook)
        for hook in (original._post_accumulate_grad_hooks or {}).values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(hook)


def _check_functions(model: nn.Module, owned: nn.Module) -> None:
    """Raise TraceError if a function among the attributes of the copy reaches a module or a tensor of the original."""
    originals: frozenset[int] | None = None
    for path, module in owned.named_modules():
        for name, value in vars(module).items():
            for function in _functions(value) if name not in _INTERNALS else ():
                if originals is None:
                    originals = frozenset(map(id, _parts(model))) - frozenset(map(id, _parts(owned)))
                if _reaches(function, originals):
                    raise TraceError(
                        f"{f'{path}.{name}' if path else name!r} is a function{_line(function)} that uses layers of "
                        "the model by its closure or by a global name. The net owns a copy of the model, and a "
                        "function is not copied with it: it would go on to use the layers of your own model, whose "
                        "weights no block trains. Write it as a method of a subclass, or bind it: "
                        "module.forward = types.MethodType(function, module), and reach layers by its first argument."
                    )


def _parts(model: nn.Module) -> Iterator[Any]:
    """Yield the modules, parameters and buffers of a model."""
    yield from model.modules()
    yield from model.parameters()
    yield from model.buffers()


def _functions(value: Any) -> Iterator[Any]:
    """Yield the functions in an attribute, those in plain containers included."""
    if isinstance(value, (FunctionType, MethodType, functools.partial)):
        yield value
    elif isinstance(value, (list, tuple, set)):
        yield from (item for item in value if isinstance(item, (FunctionType, MethodType, functools.partial)))
    elif isinstance(value, dict):
        yield from _functions(list(value.values()))


def _reaches(function: Any, originals: frozenset[int]) -> bool:
    """Whether a function can get hold of one of the modules and tensors with these ids, other than by an argument."""
    seen, waiting = dict[int, Any](), deque([function])  # the values are kept, so that no id is given twice
    while waiting and len(seen) < _MOST:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, (type, ModuleType, str, int, float, CodeType)):
            continue
        seen[id(value)] = value
        if isinstance(value, (nn.Module, Tensor)):
            if id(value) in originals:
                return True
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        else:
            waiting.extend(_behind(value))
    return False


def _behind(value: Any) -> Iterator[Any]:
    """Yield what a function, a method, a partial function or another object holds."""
    if isinstance(value, FunctionType):
        if str(value.__module__).partition(".")[0] == "torch" and value.__closure__ is None:
            return
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not set yet
                continue
        yield value.__defaults__
        yield value.__kwdefaults__
        yield vars(value)
        for name in _globals_of(value.__code__):
            yield value.__globals__.get(name)
    elif isinstance(value, MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    else:
        yield getattr(value, "__dict__", None)


def _globals_of(code: CodeType) -> Iterator[str]:
    """Yield the global names that code reads, nested functions included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _line(function: Any) -> str:
    """Return ``", file.py line 12,"`` for a function that was written in Python."""
    while isinstance(function, (MethodType, functools.partial)):
        function = function.__func__ if isinstance(function, MethodType) else function.func
    code = getattr(function, "__code__", None)
    return f", {code.co_filename} line {code.co_firstlineno}," if code is not None else ""
