"""What must not change while a forward is traced: random states, attributes and tensors of the model."""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sedona_fx.rng import random_states, restore_random, same_random_states

_CONTAINERS = (dict, list, set, deque)
_WATCHED = (torch.Tensor, *_CONTAINERS)
_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None), torch.dtype, torch.device)
_NOTES = (bool, int, float, str, type(None))
_CONSTANT = re.compile(r"_tensor_constant\d+")  # where fx keeps tensors that a forward makes from nothing
_REGISTRIES = {"_parameters": "replaces the parameter", "_buffers": "replaces the buffer"}


# What every nn.Module has for itself (hooks): most of all containers, and nothing that a forward writes to.
_MACHINERY = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


class StateWatch:
    """Remembers random states, attributes and tensors of a model, says what changed, and puts it back.

    Lists, dictionaries and sets among the attributes are looked into, however deep; objects of the user's own classes
    are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.random = random_states()
        self.containers: list[tuple[str, Any, Any]] = []  # where, the container, a shallow copy of it
        self.tensors: list[tuple[str, torch.Tensor, int, torch.Tensor | None]] = []
        seen: set[int] = set()
        self.modules = dict(model.named_modules())
        for path, module in model.named_modules():
            self._remember(path, vars(module), seen)

    def _remember(self, where: str, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            seen.add(id(value))
            # A trace can write to a parameter only behind its back; copies of all of them would cost too much.
            kept = None if isinstance(value, nn.Parameter) else value.detach().clone()
            self.tensors.append((where, value, value._version, kept))
        elif isinstance(value, _CONTAINERS):
            seen.add(id(value))
            self.containers.append((where, value, value.copy()))
            for name, inner in _items(value):
                if not isinstance(inner, _WATCHED) or (isinstance(name, str) and name in _MACHINERY):
                    continue
                self._remember(f"{where}.{name}", inner, seen)

    def changed(self, *, tensors: bool = True) -> str:
        """Return what changed since the start, in words, or an empty string.

        Without `tensors`, parameters and buffers may have been replaced: torch.export puts fake ones in their place.
        """
        if not same_random_states(self.random, random_states()):
            return "draws random numbers outside of PyTorch's modules"
        for where, container, copy in self.containers:
            if _untouched(container, copy) or (not tensors and where.rpartition(".")[2] in _REGISTRIES):
                continue
            before, after = dict(_items(copy)), dict(_items(container))
            for name in (*before, *(n for n in after if n not in before)):
                if _CONSTANT.fullmatch(str(name)):
                    continue
                if name not in before or name not in after or not _same(before[name], after[name]):
                    return f"{_words(where)} {_name(f'{where}.{name}')!r}"
        for where, tensor, version, _ in self.tensors if tensors else ():
            if tensor._version != version:
                return f"overwrites {_name(where)!r}"
        return ""

    def replaced_attributes(self) -> list[tuple[Any, str]] | None:
        """Return the modules' attributes, as (``vars(module)``, name), that hold another value now.

        None if more changed than attributes: what is inside of them, or random states.
        """
        own = [entry for entry in self.containers if entry[0].rpartition(".")[2] not in _REGISTRIES]
        found = []
        for where, container, copy in own:
            before, after = dict(_items(copy)), dict(_items(container))
            for name in after:
                if _CONSTANT.fullmatch(str(name)) or (name in before and _same(before[name], after[name])):
                    continue
                if where not in self.modules or not isinstance(name, str):
                    return None
                found.append((container, name))
        return found if same_random_states(self.random, random_states()) else None

    def restore(self) -> str:
        """Return what changed, after putting everything back."""
        changed = self.changed()
        for _, container, copy in self.containers:
            if not _untouched(container, copy):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(copy)
        with torch.no_grad():
            for _, tensor, _, kept in self.tensors:
                if kept is not None:  # whatever its version says: batch norm does not count its updates
                    tensor.copy_(kept)
        restore_random(self.random)
        return changed

    def settle(self) -> None:
        """Put everything back but what a forward only notes once (a size it has seen, hooks it has installed).

        Such notes are plain values of attributes. If parameters or buffers changed as well, nothing is kept: then the
        note might say that they have been initialised.
        """
        same = all(kept is None or torch.equal(kept, tensor) for _, tensor, _, kept in self.tensors)
        overwritten = any(tensor._version != version for _, tensor, version, _ in self.tensors)
        notes = [
            (container, name, value)
            for _, container, copy in self.containers
            if isinstance(container, dict)
            for name, value in container.items()
            if isinstance(value, _NOTES) and isinstance(copy.get(name), _NOTES) and (copy.get(name) != value)
        ]
        self.restore()
        for container, name, value in notes if same and not overwritten else ():
            container[name] = value


@contextmanager
def keep_state(model: nn.Module) -> Iterator[None]:
    """Give a model its attributes and buffers back at the end, and the global random generators their states."""
    watch = StateWatch(model)
    try:
        yield
    finally:
        watch.restore()


@contextmanager
def keep_parameters(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Give the parameters their numbers back at the end; the function says whether they were overwritten until now."""
    kept = [(parameter, parameter._version, parameter.detach().clone()) for parameter in model.parameters()]

    def overwritten() -> bool:
        return any(p._version != version or not torch.equal(p, value) for p, version, value in kept)

    try:
        yield overwritten
    finally:
        for parameter, _, value in kept:
            if not torch.equal(parameter, value):
                parameter.data.copy_(value)


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, dict):
        return iter(container.items())
    if isinstance(container, set):
        return ((item, item) for item in container)
    return iter(enumerate(container))


def _untouched(container: Any, copy: Any) -> bool:
    """Whether a container holds the very same items in the same order as its copy."""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        same_names = list(container) == list(copy)
        return same_names and all(map(operator.is_, container.values(), copy.values()))
    return all(map(operator.is_, container, copy))


def _name(where: str) -> str:
    return ".".join(part for part in where.split(".") if part and part not in _REGISTRIES)


def _words(where: str) -> str:
    return _REGISTRIES.get(where.rpartition(".")[2], "changes the attribute")


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if type(before) is type(after) and isinstance(before, (list, dict)):  # torch.export puts equal copies in place
        a, b = list(_items(before)), list(_items(after))
        return len(a) == len(b) and all(j == k and _same(x, y) for (j, x), (k, y) in zip(a, b, strict=True))
    if type(before) is not type(after) or not isinstance(before, _PLAIN):
        return False
    try:
        return bool(before == after)
    except Exception:  # a tuple with tensors in it
        return False
