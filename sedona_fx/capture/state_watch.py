"""Find and undo changes of state while a forward pass is recorded.

A graph contains tensor operations only. Whatever else the forward pass does happens once, while it is recorded, and
never again in training. So a recording is trusted only if it left all state as it was (but for attributes that
:mod:`sedona_fx.capture.attributes` clears), and these count as changes:

- A draw from a global random generator (PyTorch's, Python's ``random``, NumPy's) outside of PyTorch's modules, or from
  one among the attributes: the number would be frozen in the graph.
- An attribute of a module that was set, deleted or replaced, and an item of a list, dictionary, set or deque among the
  attributes, however deep: a counter would stop, a cache would keep what it has. Objects of the user's own classes are
  not looked into. Attributes that ``nn.Module`` itself defines (hooks) are not either: they are most of all containers,
  and no forward pass writes into them.
- A parameter or buffer that was replaced, or a tensor that was overwritten in place (seen by its version counter): the
  update would be missing in the graph.

Values are the same if they are the same object; if they are plain values (numbers, texts, tuples, dtypes, ...) of equal
type and value; or if they are lists or dictionaries of equal content, since ``torch.export`` puts equal copies in
place. Attributes named ``_tensor_constant0``, ``_tensor_constant1``, ... are no changes: fx keeps tensors there that a
forward pass creates.
"""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from sedona_fx.capture.whole.late_buffers import overwrite
from sedona_fx.rng import (
    Stream,
    random_states,
    restore_random,
    same_random_states,
    same_stream_state,
    set_stream_state,
    stream_state,
)

_CONTAINERS = (dict, list, set, deque)
_WATCHED = (torch.Tensor, Stream, *_CONTAINERS)
DRAWS = "draws random numbers outside of PyTorch's modules"
"""A change that :meth:`StateWatch.changed` names."""
_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None), torch.dtype, torch.device)
_NOTES = (bool, int, float, str, type(None))
_CONSTANT = re.compile(r"_tensor_constant\d+")
_REGISTRIES = {"_parameters": "replaces the parameter", "_buffers": "replaces the buffer"}
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


class _Container(NamedTuple):
    """A container, the dotted path to it, and a shallow copy from the start."""

    path: str
    container: Any
    copy: Any

    @property
    def registry(self) -> str:
        """Its name, if it holds the parameters or the buffers of a module, else another name."""
        return self.path.rpartition(".")[2]


class _Tensor(NamedTuple):
    """A tensor, the dotted path to it, and its version and a copy from the start."""

    path: str
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None  # None for parameters


class Left(NamedTuple):
    """What a forward left in a container.

    Attributes:
        container: the attributes of a module, or a container among them.
        content: a copy of it; tensors and objects are the same.
        names: what changed, by keys or indices.
        paths: the same as the user knows it.
    """

    container: Any
    content: Any
    names: tuple[Any, ...]
    paths: tuple[str, ...]


class StateWatch:
    """Remembers the state of a model and of the random generators; says what changed, and puts it back.

    Attributes:
        streams: the generators among the attributes, each with its state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._random = random_states()
        self._containers: list[_Container] = []
        self._tensors: list[_Tensor] = []
        self.streams: list[tuple[Stream, Any]] = []
        self._paths = {path for path, _ in model.named_modules()}
        seen: set[int] = set()
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # it notes its methods among its attributes
                for name, buffer in module._buffers.items():
                    self._remember(f"{path}.{name}", buffer, seen)
            else:
                self._remember(path, vars(module), seen)

    def _remember(self, path: str, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            seen.add(id(value))
            # A forward pass writes to a parameter only behind autograd's back; copies of all would cost too much.
            copy = None if isinstance(value, nn.Parameter) else value.detach().clone()
            self._tensors.append(_Tensor(path, value, value._version, copy))
        elif isinstance(value, Stream):
            seen.add(id(value))
            self.streams.append((value, stream_state(value)))
        elif isinstance(value, _CONTAINERS):
            seen.add(id(value))
            self._containers.append(_Container(path, value, value.copy()))
            for name, inner in _items(value):
                if isinstance(inner, _WATCHED) and not (isinstance(name, str) and name in _MODULE_INTERNALS):
                    self._remember(f"{path}.{name}", inner, seen)

    def changed(self, *, tensors: bool = True) -> str:
        """Return the first change since the start, in words that follow on "the forward", or ``""``.

        Args:
            tensors: whether parameters and buffers are looked at. ``torch.export`` replaces them by fake tensors.
        """
        if self._drawn():
            return DRAWS
        for entry in self._containers:
            if _untouched(entry) or (not tensors and entry.registry in _REGISTRIES):
                continue
            before, after = dict(_items(entry.copy)), dict(_items(entry.container))
            for name in (*before, *(n for n in after if n not in before)):
                if _CONSTANT.fullmatch(str(name)):
                    continue
                if name not in before or name not in after or not _same(before[name], after[name]):
                    what = _REGISTRIES.get(entry.registry, "changes the attribute")
                    return f"{what} {_readable(f'{entry.path}.{name}')!r}"
        for watched in self._tensors if tensors else ():
            if watched.tensor._version != watched.version:
                return f"overwrites {_readable(watched.path)!r}"
        return ""

    def _drawn(self) -> bool:
        own = any(not same_stream_state(state, stream_state(stream)) for stream, state in self.streams)
        return own or not same_random_states(self._random, random_states())

    def only_attributes(self, *, tensors: bool = True) -> bool:
        """Whether all that changed is attributes, and not random states, parameters and buffers.

        Args:
            tensors: as for :meth:`changed`.
        """
        replaced = any(not _untouched(entry) for entry in self._containers if entry.registry in _REGISTRIES)
        overwritten = any(watched.tensor._version != watched.version for watched in self._tensors)
        return not self._drawn() and not (tensors and (replaced or overwritten))

    def left(self) -> list[Left]:
        """Return what is in the attributes, and in the containers among them, that changed since the start."""
        found = []
        for entry in self._containers:
            if entry.registry not in _REGISTRIES and not _untouched(entry):
                before, after = dict(_items(entry.copy)), dict(_items(entry.container))
                names = [n for n in after if not (n in before and _same(before[n], after[n]))]
                names = [n for n in names if not _CONSTANT.fullmatch(str(n))]
                if names or len(before) != len(after):
                    paths = tuple(_readable(f"{entry.path}.{name}") for name in names)
                    content = content_of(entry.container, names)
                    found.append(Left(entry.container, content, tuple(names), paths))
        return found

    def remove_added(self) -> None:
        """Delete the attributes of modules that were not there at the start."""
        for entry in self._containers:
            if entry.path in self._paths and isinstance(entry.container, dict):
                for name in [n for n in entry.container if n not in entry.copy and not _CONSTANT.fullmatch(str(n))]:
                    del entry.container[name]

    def restore(self) -> str:
        """Put everything back; return what :meth:`changed` said before."""
        changed = self.changed()
        for entry in self._containers:
            if not _untouched(entry):
                refill(entry.container, entry.copy)
        with torch.no_grad():
            for watched in self._tensors:
                if watched.copy is not None:  # even if the version is the same: batch norm does not count its updates
                    overwrite(watched.tensor, watched.copy)
        restore_random(self._random)
        for stream, state in self.streams:
            set_stream_state(stream, state)
        return changed

    def settle(self, after_one: StateWatch) -> bool:
        """Put everything back, except what a forward pass only notes once: a size it has seen, hooks it has installed.

        Such notes are attributes whose plain value changed in the first call, and not again in the second: a counter is
        none. If a parameter or buffer changed as well, no note is kept: it might say that they have been initialised,
        which is undone.

        Args:
            after_one: the state after the first of two calls.

        Returns:
            Whether there are notes that were kept.
        """
        same_values = all(w.copy is None or torch.equal(w.copy, w.tensor) for w in self._tensors)
        same_versions = all(w.tensor._version == w.version for w in self._tensors)
        counted = {
            (id(entry.container), name)
            for entry in after_one._containers
            if isinstance(entry.container, dict)
            for name, value in entry.copy.items()
            if isinstance(value, _NOTES) and entry.container.get(name) != value
        }
        notes = [
            (entry.container, name, value)
            for entry in self._containers
            if isinstance(entry.container, dict)
            for name, value in entry.container.items()
            if isinstance(value, _NOTES)
            and isinstance(entry.copy.get(name), _NOTES)
            and (entry.copy.get(name) != value)
            and (id(entry.container), name) not in counted
        ]
        self.restore()
        # PyTorch's own mark at modules with backward hooks goes with the hook: it stays only if a note says so.
        if not (same_values and same_versions and any(name not in _MODULE_INTERNALS for _, name, _ in notes)):
            return False
        for container, name, value in notes:
            container[name] = value
        return True


def content_of(container: Any, names: Collection[Any]) -> Any:
    """Return a copy of a container, with copies of the containers under some of its keys or indices."""
    content = container.copy()
    for name in names if not isinstance(content, set) else ():
        content[name] = _structure(content[name])
    return content


def _structure(value: Any) -> Any:
    """Return a copy of nested containers that holds the same tensors and objects."""
    if type(value) is dict:
        return {key: _structure(item) for key, item in value.items()}
    if type(value) in (list, deque):
        return type(value)(_structure(item) for item in value)
    return value.copy() if isinstance(value, _CONTAINERS) else value


def refill(container: Any, content: Any) -> None:
    """Let a list, deque, dictionary or set hold something else."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    """Return (name, item) pairs: the name is a key, an index, or for sets the item itself."""
    if isinstance(container, dict):
        return iter(container.items())
    if isinstance(container, set):
        return ((item, item) for item in container)
    return iter(enumerate(container))


def _untouched(entry: _Container) -> bool:
    """Whether a container holds the very same objects in the same order as its copy."""
    container, copy = entry.container, entry.copy
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        same_names = list(container) == list(copy)
        return same_names and all(map(operator.is_, container.values(), copy.values()))
    return all(map(operator.is_, container, copy))


def _readable(path: str) -> str:
    """Return a path as the user knows it, without the names of the registries."""
    return ".".join(part for part in path.split(".") if part and part not in _REGISTRIES)


def _same(before: Any, after: Any) -> bool:
    """Whether two values count as the same (see the module's docstring)."""
    if before is after:
        return True
    if type(before) is type(after) and isinstance(before, (list, dict)):
        a, b = list(_items(before)), list(_items(after))
        return len(a) == len(b) and all(j == k and _same(x, y) for (j, x), (k, y) in zip(a, b, strict=True))
    if type(before) is not type(after) or not isinstance(before, _PLAIN):
        return False
    try:
        return bool(before == after)
    except Exception:  # a tuple that holds tensors
        return False
