"""Hooks: those that a forward registers while it runs, and those that hang on modules before it does.

A graph holds operations only. A hook that the forward puts on a tensor (``h.register_hook``) changes gradients and is
no operation; a hook that it puts on a parameter or on a module would be put there once, while the forward is recorded,
and not at every call. So registrations are watched while a forward is recorded. Modules that stay whole run as they
are, and may do all of this.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from sedona_fx.capture.blame import current_line
from sedona_fx.plan_values import FrontEnd

log = logging.getLogger(__name__)

TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
"""Methods of tensors that put a hook on them."""
_BACKWARD_HOOKS = ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook")
_FORWARD_HOOKS = ("register_forward_hook", "register_forward_pre_hook")
_ON_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_ON_FORWARD = ("_forward_hooks", "_forward_pre_hooks")


@dataclass
class Registrations:
    """The hooks that were registered while :func:`watch_hooks` watched.

    Attributes:
        gradient_hooks: those that may change gradients, in words that follow on "its forward".
        saved_tensors: regions with hooks on the tensors saved for backward, in such words.
        forward_hooks: those on the forward of modules, in such words, with their handles.
        handles: of all hooks.
        on_values: whether one of them is for the gradient of a value that is computed, and not of a parameter.
    """

    gradient_hooks: list[str] = field(default_factory=list)
    saved_tensors: list[str] = field(default_factory=list)
    forward_hooks: list[tuple[str, RemovableHandle]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    on_values: bool = False

    def first(self) -> str:
        """Return the first registration that a graph would lose, in words that follow on "its forward", or ``""``.

        Forward hooks count only if they are still there: one that is removed in the same forward has done its work.
        """
        left = [text for text, handle in self.forward_hooks if handle.id in (handle.hooks_dict_ref() or ())]
        return next(iter([*self.gradient_hooks, *left]), "")

    def remove(self) -> None:
        """Take all of them away again."""
        for handle in self.handles:
            handle.remove()


@contextmanager
def watch_hooks(seen: Registrations) -> Iterator[None]:
    """Note every hook that is registered on a tensor or a module in the body. They stay, unless they are removed."""
    with ExitStack() as patches:
        for method in TENSOR_HOOKS:
            patches.enter_context(replaced_here(torch.Tensor, method, _noting(seen, torch.Tensor, method)))
        for method in (*_BACKWARD_HOOKS, *_FORWARD_HOOKS):
            patches.enter_context(replaced_here(nn.Module, method, _noting(seen, nn.Module, method)))
        patches.enter_context(replaced_here(saved_tensors_hooks, "__enter__", _noting_region(seen)))
        yield


@contextmanager
def replaced_here(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a class or of a module in the body, for the thread that runs it; others call the original.

    What another thread does meanwhile is no part of the forward that is recorded.
    """
    original, thread = vars(owner)[name], threading.get_ident()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == thread else original)(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def refusal(what: str) -> str:
    """Return why a forward with a hook of its own cannot be recorded, from what :meth:`Registrations.first` said."""
    return (
        f"its forward {what}: a graph keeps no hooks, so gradients would be others than the model's, or the hook would "
        "never run. Register a hook on a parameter or a module once, outside of forward; put the lines with a tensor's "
        "hook into a module of their own and name that in leaf_modules=[...]."
    )


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """Return the kinds of hooks (``"forward"``, ``"backward"``) of the user's own that hang on a module."""
    kinds = {"forward": _ON_FORWARD, "backward": _ON_BACKWARD}
    return tuple(kind for kind, registries in kinds.items() if any(_has_own(module, name) for name in registries))


def hooked_modules(model: nn.Module, kind: str, whole: Collection[nn.Module] = ()) -> list[str]:
    """Return the paths of the modules with hooks of a kind; the model itself is ``"the model itself"``.

    Args:
        model: the model.
        kind: of :func:`hooks_of`.
        whole: modules that run as they are, so that hooks on them and inside of them run; they are left out.
    """
    inside = {inner for module in whole for inner in module.modules()}
    hooked = [path for path, m in model.named_modules() if m not in inside and kind in hooks_of(m)]
    return [repr(path) if path else "the model itself" for path in hooked]


def tell_of_silent_hooks(model: nn.Module, whole: Collection[nn.Module], front_end: FrontEnd) -> None:
    """Say which hooks will never run: those of the model itself and, in an exported program, of what is not whole.

    In symbolic graphs modules with hooks stay whole, so that the hooks run; what that costs is logged.

    Args:
        model: that has been recorded.
        whole: modules that its graphs call.
        front_end: that recorded it.
    """
    exported = front_end == "export"
    if silent := hooked_modules(model, "forward", whole) if exported else ["the model itself"][: bool(hooks_of(model))]:
        where = ", which torch.export has recorded as one flat program" if exported else ""
        warnings.warn(
            f"hooks hang on {', '.join(silent)}{where}: they never run in the net. What they do to values while the "
            "model is recorded is part of the net.",
            stacklevel=3,
        )
    elif kept := [path for path, module in model.named_modules() if hooks_of(module) and any(module.children())]:
        log.warning(
            "hooks hang on %s: such modules stay whole, so that their hooks run, and there is no cut inside of them. "
            "Remove the hooks before the model is decoupled for cuts there.",
            ", ".join(map(repr, kept)),
        )


def _has_own(module: nn.Module, registry: str) -> bool:
    """Whether a registry of hooks holds one of the user's own.

    PyTorch's own do not count (weight norm and pruning are made of hooks), nor those that an installed library puts on
    its own modules (transformers collects outputs so): they are part of how the model computes, and the proof is there.
    """
    hooks = vars(module).get(registry) or {}
    library = _library(type(module).__module__)
    names = [_module_name(hook) for hook in hooks.values()]
    return any(not name.startswith("torch.") and not (library and _library(name) == library) for name in names)


def _library(module_name: str) -> str:
    """Return the top-level package of a module if it is an installed one, else ``""``."""
    package = module_name.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package if "site-packages" in file else ""


def _module_name(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _noting(seen: Registrations, owner: type, method: str) -> Callable[..., Any]:
    original = getattr(owner, method)

    def register(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = original(self, *args, **kwargs)
        on = "a module" if owner is nn.Module else "a parameter" if isinstance(self, nn.Parameter) else "a tensor"
        text = f"registers a hook on {on} ({method}{current_line()})"
        if method in _FORWARD_HOOKS:
            seen.forward_hooks.append((text, handle))
        else:
            seen.gradient_hooks.append(text)
            seen.on_values = seen.on_values or not isinstance(self, nn.Parameter)
        seen.handles.append(handle)
        return handle

    return register


def _noting_region(seen: Registrations) -> Callable[..., Any]:
    original = saved_tensors_hooks.__enter__

    def enter(self: Any) -> Any:
        seen.saved_tensors.append(f"has hooks on the tensors saved for backward{current_line()}")
        return original(self)

    return enter
