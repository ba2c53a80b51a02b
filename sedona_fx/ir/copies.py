"""Copies of modules that hold what Python does not copy: tensors with a graph, locks, open files, iterators.

A tensor among the attributes that was computed (the ``weight`` of ``torch.nn.utils.weight_norm``) is copied without its
graph. A lock, an open file, or a Python module is the same one in the copy. What else refuses to be copied is shared as
well, but for the copy that a net owns: there it is an error, unless the model is to be shared anyway.
"""

from __future__ import annotations

import copy
import copyreg
import io
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from sedona_fx.errors import DataError
from sedona_fx.rng import turn

T = TypeVar("T")
COMPUTED = "_sedona_fx_computed"
"""Attribute of tensors that are copies of computed ones, without their graph."""

_SHARED = (
    type(threading.Lock()),
    type(threading.RLock()),
    io.TextIOWrapper,
    io.BufferedReader,
    io.BufferedWriter,
    io.BufferedRandom,
    io.FileIO,
    types.ModuleType,
)
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Uncopyable(NamedTuple):
    """What cannot be copied.

    Attributes:
        path: the dotted path to the attribute that it is or is in.
        value: that attribute's value, or one entry of a registry of hooks.
        error: what copying it raised.
    """

    path: str
    value: Any
    error: Exception


def deep_copy(value: T, memo: dict[int, Any] | None = None) -> T:
    """Return a deep copy of modules, in which everything that cannot be copied is shared.

    Args:
        value: a module, or a container with modules.
        memo: as for ``copy.deepcopy``.

    Raises:
        DataError: a module with parameters or buffers of its own cannot be copied. What is done with the copy would be
            done to them.
    """
    memo = {} if memo is None else memo
    with copied_anyway():
        trial = dict(memo)
        try:
            result = copy.deepcopy(value, trial)
        except Exception:
            refusing = uncopyable(value)
            if not refusing:
                raise
            _check_apart(refusing, memo)
            trial = {**memo, **{id(one.value): one.value for one in refusing}}
            result = copy.deepcopy(value, trial)
    # What the copies were made of has to live as long as the memo, which knows it by its id.
    memo.setdefault(id(memo), []).extend(trial.pop(id(trial), []))
    memo.update(trial)
    return result


def _check_apart(refusing: Iterable[Uncopyable], memo: Mapping[int, Any]) -> None:
    for path, module, error in refusing:
        tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        if any(id(tensor) not in memo for tensor in tensors):
            raise DataError(
                f"{path!r}, a {type(module).__name__}, cannot be copied ({type(error).__name__}: {error}), and this "
                "needs a copy of its parameters, so that your own stay as they are. Let its class be copied: searches, "
                "copies of the net and the checks of an ONNX file need that."
            )


@contextmanager
def copied_anyway() -> Iterator[None]:
    """Let ``copy.deepcopy`` copy computed tensors without their graph, and share locks, files and Python modules."""
    with turn():  # both are the process's own
        yield from _patched()


def _patched() -> Iterator[None]:
    original, table = Tensor.__deepcopy__, copyreg.dispatch_table
    before = {kind: table.get(kind) for kind in _SHARED}

    def detached(self: Tensor, memo: dict[int, Any]) -> Any:
        if self.is_leaf or id(self) in memo:
            return original(self, memo)
        memo[id(self)] = new = self.detach().clone()
        setattr(new, COMPUTED, True)
        return new

    Tensor.__deepcopy__ = detached  # type: ignore[method-assign]
    table.update(dict.fromkeys(_SHARED, _itself))
    try:
        yield
    finally:
        Tensor.__deepcopy__ = original  # type: ignore[method-assign]
        for kind, reducer in before.items():
            if reducer is None:
                del table[kind]
            else:
                table[kind] = reducer


def uncopyable(value: Any) -> list[Uncopyable]:
    """Return what in the attributes of modules cannot be copied; to be called within :func:`copied_anyway`.

    Args:
        value: as for :func:`deep_copy`.
    """
    found: list[Uncopyable] = []
    roots = list(_modules_in(value))
    kept: list[Any] = [module for root in roots for module in root.modules()]
    kept += [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
    for root in roots:
        for path, module in root.named_modules():
            if _refuses := _error(module, [other for other in kept if other is not module], own=True):
                found.append(Uncopyable(path, module, _refuses))
                continue
            for name, attribute in vars(module).items():
                entries = attribute.values() if isinstance(attribute, dict) and name.startswith("_") else [attribute]
                for entry in entries if name not in _REGISTRIES else ():
                    if error := _error(entry, kept):
                        found.append(Uncopyable(f"{path}.{name}".lstrip("."), entry, error))
    return found


def _itself(value: Any) -> str:
    """Return a text, which tells ``copy.deepcopy`` to take the value itself."""
    return type(value).__name__


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _modules_in(item)
    elif isinstance(value, dict):
        yield from _modules_in(list(value.values()))


def _error(value: Any, kept: Collection[Any], *, own: bool = False) -> Exception | None:
    """Return what copying a value raises, where `kept` is not copied with it; None if nothing.

    Args:
        value: the value.
        kept: modules and tensors.
        own: whether only a way to copy of the value's own is tried.
    """
    if own and not hasattr(type(value), "__deepcopy__"):
        return None
    try:
        copy.deepcopy(value, {id(item): item for item in kept})
    except Exception as error:
        return error
    return None
