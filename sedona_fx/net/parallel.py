"""Refuse what would train a net in several processes, or on several devices, without knowing how it trains.

``DistributedDataParallel`` averages gradients in the backward pass through its own forward; ``net.backward`` and
schedules run blocks, of which it hears nothing: every process would train by itself, without a word. The same holds
where the model inside of a net is wrapped.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sedona_fx.errors import ParallelError
from sedona_fx.net.watch import Change

_MARK = "_is_fsdp_managed_module"
"""What ``FullyShardedDataParallel`` and ``fully_shard`` leave on every module that they look after."""
_wrapped: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Modules inside of a ``DistributedDataParallel`` -> that."""

AVERAGED = (
    "train in one process (decouple(..., devices=[...]) puts its blocks on several devices), or average the gradients "
    "of all processes, which start from the same weights (dist: torch.distributed):\n\n"
    "    net.backward(x, y)\n"
    "    for p in (p for p in net.parameters() if p.grad is not None):\n"
    "        dist.all_reduce(p.grad); p.grad /= dist.get_world_size()\n"
    "    optimizer.step()\n\n"
    "A schedule does the two lines in the middle in its on_gradients, for self.parameters[block.index]."
)
"""What works today."""


class OneProcess(nn.Module):
    """The part of a net that refuses to be wrapped."""

    def __init__(self) -> None:
        super().__init__()
        watch_wrappers()

    @property
    def _is_fsdp_managed_module(self) -> bool:
        """Set by ``FullyShardedDataParallel`` on all modules inside, before it changes anything; else absent."""
        raise AttributeError

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, _: bool) -> None:
        _refuse("FullyShardedDataParallel")

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """As that of every module, but for hooks of ``torch.distributed``.

        Raises:
            ParallelError: ``fully_shard`` or ``replicate`` puts its own there, before it changes any parameter.
        """
        if is_distributed(hook):
            _refuse("fully_shard or replicate")
        return super().register_forward_pre_hook(hook, **options)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse what ``torch.nn.parallel.data_parallel`` asks of a module."""
        _refuse("DataParallel")


@functools.cache
def watch_wrappers() -> None:
    """Look at every module that is put into ``DataParallel`` or ``DistributedDataParallel`` from now on.

    These call nothing of a module when they are made: PyTorch's hook on the registration of modules is the only place
    to notice them.
    """
    nn.modules.module.register_module_module_registration_hook(_on_registration)


def require_unwrapped(model: nn.Module) -> None:
    """Check before a step that the model of a net is not in a ``DistributedDataParallel``.

    Raises:
        ParallelError: it is.
    """
    if _wrapped and model in _wrapped and _wrapped[model]() is not None:
        raise ParallelError(
            "net.model is inside of DistributedDataParallel, which averages gradients of its own forward alone; the "
            f"net runs its blocks, so that every process would train by itself. Drop the wrapper, and {AVERAGED}"
        )


def warn_of_replicas(model: nn.Module) -> None:
    """Say that what averages the gradients of several processes is left out, where a net is made of what it wraps.

    Args:
        model: what the user handed over, a ``DistributedDataParallel`` perhaps.
    """
    group: Any = getattr(model, "process_group", None)
    replicated = isinstance(model, nn.parallel.DistributedDataParallel)
    if replicated and torch.distributed.get_world_size(group) > 1:
        warnings.warn(
            "the net is made of the model inside of DistributedDataParallel, which averages no gradients of the net: "
            f"each process would train by itself. Instead, {AVERAGED}",
            stacklevel=5,
        )


def is_distributed(value: Any) -> bool:
    """Whether a value is of ``torch.distributed``: a sharded tensor, a function or a method from there."""
    return str(getattr(value, "__module__", "")).startswith("torch.distributed")


def refuse_sharded(changes: Iterable[Change]) -> None:
    """Check that no part of a net's model was sharded, except modules that graphs call whole, which gather themselves.

    Args:
        changes: what is another one in the model than it was.

    Raises:
        ParallelError: one was.
    """
    for change in changes:
        sharded = change.kind in ("parameter", "buffer", "hook") and is_distributed(change.after)
        if sharded or change.name == _MARK:
            path = change.path.removesuffix(_MARK).rstrip(".")
            break
    else:
        return
    raise ParallelError(
        f"{path or 'net.model'!r} was sharded by torch.distributed since the model was decoupled. Its parameters are "
        f"gathered when that module is called, and the net runs the code inside without calling it. Instead, {AVERAGED}"
    )


def _on_registration(parent: nn.Module, _: str, child: nn.Module | None) -> None:
    if child is None or not isinstance(parent, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return
    inside = list(child.modules())
    if any(isinstance(module, OneProcess) for module in inside):
        _refuse(type(parent).__name__)
    if isinstance(parent, nn.parallel.DistributedDataParallel):
        _wrapped.update(dict.fromkeys(inside, weakref.ref(parent)))


def _refuse(wrapper: str) -> NoReturn:
    alone = "one device alone would train" if wrapper == "DataParallel" else "every process would train by itself"
    raise ParallelError(
        f"{wrapper} does not train a net: it looks after its own forward and the backward pass through that, while "
        f"net.backward and schedules run the net's blocks, so that {alone}. Instead, {AVERAGED}"
    )
