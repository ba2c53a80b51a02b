"""Notice what was replaced in a net's modules since its graphs were made, in a few microseconds a step.

A graph calls the modules that it was recorded with, reads tensors by name, and has frozen every other value that the
recorded code read. So what is held in these places is remembered, and compared by identity: sub-modules, parameters and
buffers in every module whose code is part of the graph, its class, and its attributes, those in lists, dictionaries and
objects (configurations) included. Modules that a graph calls whole run as they are; of these only the parameters are
compared, for schedules, whose optimizers hold them.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

MISSING: Any = object()
"""Stands for a value that is not there."""
_REGISTRIES = {"_modules": "module", "_parameters": "parameter", "_buffers": "buffer"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNALS = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module)) - {"forward"}
_LARGEST = 64
"""Of containers with more entries (vocabularies) only the number of entries is compared."""
_DEEPEST = 4
"""How many containers inside of each other are looked into."""


class Change(NamedTuple):
    """A value that is another one than when the watch began.

    Attributes:
        path: the dotted path to it in the net's model (or ``heads.0``).
        kind: ``"module"``, ``"parameter"``, ``"buffer"``, ``"attribute"`` or ``"hook"``; ``"live"`` for a parameter
            that graphs follow by themselves.
        owner: the module or object of which it is an attribute, or has to do with one.
        name: name of that attribute.
        before, after: the values; :data:`MISSING` where there is none.
        container: what holds the value.
        key: under which key.
    """

    path: str
    kind: str
    owner: Any
    name: str
    before: Any
    after: Any
    container: Any
    key: Any


class _Held(NamedTuple):
    """A container, what it held, and where it is. `name`: the attribute that leads to it; empty if each key is one."""

    path: str
    kind: str
    owner: Any
    name: str
    container: Any
    content: dict[Any, Any]


class Watch:
    """Remembers what the modules of a net hold.

    Args:
        net: the module with the children ``model`` and ``heads``.
        whole: paths of the modules in ``model`` that graphs call whole.
        root: path of the module in ``model`` whose code is part of the graphs; empty for all of it.

    Attributes:
        version: is another number whenever something had changed and was taken.
    """

    def __init__(self, net: nn.Module, whole: Collection[str], root: str = "") -> None:
        self._net, self._whole, self._root = net, tuple(whole), root
        self.version = 0
        self.take()

    def take(self) -> None:
        """Remember what the modules hold now."""
        self._held: list[_Held] = []
        self._modules: list[tuple[str, nn.Module]] = []  # whose code is part of the graph
        self._seen: set[int] = set()
        self._look()
        self._classes = [type(module) for _, module in self._modules]
        small = [held for held in self._held if len(held.content) > 0]
        self._sized = [held.container for held in self._held]
        self._sizes = list(map(len, self._sized))
        self._containers = [held.container for held in small]
        self._getters = [_getter(held) for held in small]
        self._values = list(chain.from_iterable(map(operator.call, self._getters, self._containers)))
        self.version += 1

    def unchanged(self) -> bool:
        """Whether every container holds the very same objects."""
        try:
            return (
                list(map(len, self._sized)) == self._sizes
                and [type(module) for _, module in self._modules] == self._classes
                and all(
                    map(
                        operator.is_,
                        chain.from_iterable(map(operator.call, self._getters, self._containers)),
                        self._values,
                    )
                )
            )
        except KeyError:
            return False

    def changes(self) -> list[Change]:
        """Return every value that is another one now; attributes that PyTorch's own code sets are left out."""
        changes = []
        for (path, module), old_class in zip(self._modules, self._classes, strict=True):
            if type(module).forward is not old_class.forward:  # parametrizations and sharding keep it
                values = {"before": old_class, "after": type(module), "container": None, "key": None}
                changes.append(Change(path, "module", module, path.rpartition(".")[2], **values))
        for path, kind, owner, attribute, container, before in self._held:
            after = _content(container)
            if kind == "attribute" and isinstance(owner, nn.Module) and not attribute:
                after = {name: value for name, value in after.items() if name not in _INTERNALS}
            if len(after) > _LARGEST or len(container) > _LARGEST:
                if len(container) != self._sizes[self._at(container)]:
                    size = {"before": MISSING, "after": container, "container": None, "key": None}
                    changes.append(Change(path, kind, owner, attribute, **size))
                continue
            for name in [*before, *(name for name in after if name not in before)]:
                old, new = before.get(name, MISSING), after.get(name, MISSING)
                if old is not new:
                    where = path if kind == "hook" else f"{path}.{name}".lstrip(".")
                    values = {"before": old, "after": new, "container": container, "key": name}
                    changes.append(Change(where, kind, owner, attribute or str(name), **values))
        return changes

    def _at(self, container: Any) -> int:
        return next(index for index, other in enumerate(self._sized) if other is container)

    def _look(self) -> None:
        """Remember the content of everything that is to be compared."""
        model, heads = self._net.get_submodule("model"), self._net.get_submodule("heads")
        self._hold("", "module", self._net, self._net._modules)
        self._hold("heads", "module", heads, heads._modules)
        for path, module in heads.named_modules(prefix="heads"):
            self._hold(path, "live", module, module._parameters)
        whole = set()
        for path in self._whole:
            try:
                whole.add(model.get_submodule(path))
            except AttributeError:  # it is gone, and whoever took that over said so
                continue
        self._look_into(model, "", whole)

    def _look_into(self, module: nn.Module, path: str, whole: Collection[nn.Module]) -> None:
        if id(module) in self._seen or isinstance(module, torch.jit.ScriptModule):  # nothing in it can be replaced
            return
        self._seen.add(id(module))
        if module in whole:
            for inner_path, inner in module.named_modules(prefix=path):
                if not isinstance(inner, torch.jit.ScriptModule):
                    self._hold(inner_path, "live", inner, inner._parameters)
            return
        for registry, kind in _REGISTRIES.items():
            self._hold(path, kind, module, getattr(module, registry))
        if not self._root or f"{path}.".startswith(f"{self._root}."):
            self._modules.append((path, module))
            for hooks in _HOOKS:
                self._hold(path, "hook", module, getattr(module, hooks))
            self._hold_attributes(path, module)
        for name, child in module._modules.items():
            if child is not None:
                self._look_into(child, f"{path}.{name}".lstrip("."), whole)

    def _hold(self, path: str, kind: str, owner: Any, container: Any, name: str = "") -> None:
        content = _content(container)
        self._held.append(_Held(path, kind, owner, name, container=container, content=content))

    def _hold_attributes(self, path: str, owner: Any, depth: int = 0) -> None:
        """Remember the attributes of a module or of an object, and look into those that are containers."""
        names = [name for name in vars(owner) if not (isinstance(owner, nn.Module) and name in _INTERNALS)]
        content = {name: vars(owner)[name] for name in names} if len(names) <= _LARGEST else {}
        self._held.append(_Held(path, "attribute", owner, "", container=vars(owner), content=content))
        for name, value in content.items():
            self._look_inside(f"{path}.{name}".lstrip("."), owner, name, value, depth + 1)

    def _look_inside(self, path: str, owner: Any, name: str, value: Any, depth: int) -> None:
        """Remember the content of an attribute that is a container or an object with attributes of its own."""
        if depth > _DEEPEST or id(value) in self._seen:
            return
        if isinstance(value, (dict, list, set, deque)):
            self._seen.add(id(value))
            self._hold(path, "attribute", owner, value, name)
            for key, item in _content(value).items():
                self._look_inside(f"{path}.{key}", owner, name, item, depth + 1)
        elif _has_settings(value):
            self._seen.add(id(value))
            self._hold_attributes(path, value, depth)


def _has_settings(value: Any) -> bool:
    """Whether a value is an object of some class of the user's, such as a configuration."""
    package = type(value).__module__.partition(".")[0]
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, (nn.Module, torch.Tensor, type))
        and not callable(value)
        and package not in ("torch", "builtins", "numpy")
    )


def _content(container: Any) -> dict[Any, Any]:
    """Return key -> item; a key is that of a dictionary or an index. Empty for large containers."""
    if len(container) > _LARGEST:
        return {}
    return dict(container) if isinstance(container, dict) else dict(enumerate(container))


def _getter(held: _Held) -> Any:
    """Return a function that gives the remembered items of a container as a tuple, as it holds them then."""
    if not isinstance(held.container, dict):
        return tuple
    names = list(held.content)
    return operator.itemgetter(*names, names[0])  # of a single name it would give the bare item


@contextmanager
def noting_reads(changes: Collection[Change], read: set[tuple[int, str]]) -> Iterator[None]:
    """Add (id of the owner, name) of those of the changed attributes to `read` that are read in the body.

    Raises:
        TypeError: the class of an owner does not allow that.
    """
    by_class: dict[type, set[tuple[int, str]]] = {}
    for change in changes:
        by_class.setdefault(type(change.owner), set()).add((id(change.owner), change.name))
    with ExitStack() as stack:
        for kind, wanted in by_class.items():
            stack.enter_context(_noting_class(kind, wanted, read))
        yield


@contextmanager
def _noting_class(kind: type, wanted: Collection[tuple[int, str]], read: set[tuple[int, str]]) -> Iterator[None]:
    original: Any = kind.__getattribute__
    own = "__getattribute__" in vars(kind)

    def noting(self: Any, name: str) -> Any:
        if (id(self), name) in wanted:
            read.add((id(self), name))
        return original(self, name)

    setattr(kind, "__getattribute__", noting)  # noqa: B010 - a class of the user's
    try:
        yield
    finally:
        if own:
            setattr(kind, "__getattribute__", original)  # noqa: B010
        else:
            delattr(kind, "__getattribute__")
