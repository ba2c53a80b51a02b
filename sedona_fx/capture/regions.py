"""Watch in which autocast and no-grad regions a forward pass runs while it is recorded.

Neither front end can read all of it off the interpreter: ``autocast(enabled=False)`` changes nothing outside of
autocast, and ``torch.export`` does not record ``torch.inference_mode``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sedona_fx.capture.hooks import replaced_here
from sedona_fx.errors import TraceError
from sedona_fx.ir.region import Cast, Entry, Region

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
_ASKED = "_sedona_fx_asked"
"""Attribute of an autocast object: what its maker asked for, as a :class:`Cast`."""
_BEFORE = "_sedona_fx_before"
"""Attribute of a grad mode's object: whether the code around it runs without gradients."""
_ASKS = ("is_autocast_enabled", "is_autocast_cpu_enabled")
_STATE = ("set_autocast_enabled", "set_autocast_dtype", "is_autocast_enabled", "get_autocast_dtype")
_STATE_OF_ONE_DEVICE = (
    *("set_autocast_cpu_enabled", "set_autocast_cpu_dtype", "is_autocast_cpu_enabled", "get_autocast_cpu_dtype"),
    *("set_autocast_gpu_dtype", "get_autocast_gpu_dtype"),
)


class RegionWatch:
    """The regions that are open in the code that runs now; made by :func:`watch_regions`.

    Attributes:
        casts: the autocast regions, innermost last.
        grad: whether the code has turned gradients off, or on whatever its caller does (``torch.enable_grad``); None:
            neither. The interpreter's own state does not tell: gradients are off in the forward pass of a
            ``torch.autograd.Function``, too, which has a backward pass nevertheless.
    """

    def __init__(self) -> None:
        self.casts: list[Cast] = []
        self.grad: bool | None = None
        self.entries = 0  # how often an outermost autocast region was entered

    def current(self) -> Region | None:
        """Return the region of what is recorded now, or None outside of all regions."""
        casts = {cast.device_type: cast for cast in self.casts}
        entry = Entry(self.entries, self.casts[0]) if self.casts else None
        region = Region(self.grad, tuple(casts.values()), entry)
        return region if region != Region() else None


@contextmanager
def watch_regions(*, strict: bool, told: list[str] | None = None) -> Iterator[RegionWatch]:
    """Yield a watch of the autocast and no-grad regions that are entered in the body.

    ``torch.inference_mode`` is ``torch.no_grad`` meanwhile: tensors made in it would be of no use for backward.

    Args:
        strict: refuse code that reads or sets the state of autocast by functions.
        told: tell code that asks whether autocast is on that it is (much of Hugging Face's opens a region that turns it
            off only then), and add the name of the function to this list. None: tell the truth.

    Raises:
        TraceError: such code ran in the body.
    """
    watch = RegionWatch()
    autocast, inference_mode = torch.autocast, torch.inference_mode
    make, enter, leave = autocast.__init__, autocast.__enter__, autocast.__exit__

    @functools.wraps(make)
    def noted(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        make(self, device_type, dtype, enabled, cache_enabled)
        # Not `self._enabled`: where there is no such device, it is False, and the net may be moved to one. Nor
        # `self._cache_enabled`: torch.export switches the cache off while it captures, for all that is not asked for.
        cache = False if cache_enabled is not None and not cache_enabled else None
        vars(self)[_ASKED] = Cast(device_type, bool(enabled), dtype if enabled else None, cache)

    def entering(self: Any) -> Any:
        cache = None if self._cache_enabled else False
        made_before = Cast(self.device, self._enabled, self.fast_dtype if self._enabled else None, cache)
        watch.entries += not watch.casts
        watch.casts.append(vars(self).get(_ASKED, made_before))
        return enter(self)

    def leaving(self: Any, *error: Any) -> Any:
        watch.casts.pop()
        return leave(self, *error)

    def starting(original: Callable[..., Any], keep: bool, mode: bool | None = None) -> Callable[..., Any]:
        def start(self: Any, *args: Any) -> Any:
            before, enabled = watch.grad, torch.is_grad_enabled()
            result = original(self, *args)
            vars(self).setdefault(_BEFORE, before) if keep else vars(self).update({_BEFORE: before})
            if mode or (self.mode if mode is None else mode):
                # A function that sets the mode to True may only set it back to what the caller has.
                watch.grad = True if mode else None if before is False else before
            elif enabled or before is False:
                watch.grad = False
            return result

        return start

    def ending(original: Callable[..., Any]) -> Callable[..., Any]:
        def end(self: Any, *error: Any) -> Any:
            result = original(self, *error)
            watch.grad = vars(self)[_BEFORE]
            return result

        return end

    def stop(self: Any) -> None:
        self._in_its_place = torch.no_grad() if self.mode else torch.enable_grad()
        self._in_its_place.__enter__()

    def resume(self: Any, *error: Any) -> None:
        self._in_its_place.__exit__(*error)

    set_grad, no_grad, enable_grad = torch.set_grad_enabled, torch.no_grad, torch.enable_grad
    with ExitStack() as stack:
        for owner, name, function in (
            (autocast, "__init__", noted),
            (autocast, "__enter__", entering),
            (autocast, "__exit__", leaving),
            (set_grad, "__init__", starting(set_grad.__init__, keep=False)),  # it sets the mode before it is entered
            (set_grad, "__enter__", starting(set_grad.__enter__, keep=True)),
            (set_grad, "__exit__", ending(set_grad.__exit__)),
            (no_grad, "__enter__", starting(no_grad.__enter__, keep=False, mode=False)),
            (no_grad, "__exit__", ending(no_grad.__exit__)),
            (enable_grad, "__enter__", starting(enable_grad.__enter__, keep=False, mode=True)),
            (enable_grad, "__exit__", ending(enable_grad.__exit__)),
            (inference_mode, "__enter__", stop),
            (inference_mode, "__exit__", resume),
        ):
            stack.enter_context(replaced_here(owner, name, function))
        for name in (*_STATE, *_STATE_OF_ONE_DEVICE) if strict else ():
            stack.enter_context(replaced_here(torch, name, _outside(getattr(torch, name), _refused(name))))
        if told is not None:
            for name in _ASKS:
                telling = _outside(getattr(torch, name), _telling(name, told))
                stack.enter_context(replaced_here(torch, name, telling))
        yield watch


def _outside(function: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is another one where code outside of PyTorch calls it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(2).f_globals.get("__name__"))  # behind `replaced_here`
        return (function if caller.partition(".")[0] == "torch" else other)(*args, **kwargs)

    return call


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise TraceError(f"torch.{name} is called, whose result is another one when the net runs under autocast")

    return refuse


def _telling(name: str, told: list[str]) -> Callable[..., bool]:
    def tell(*_: Any, **__: Any) -> bool:
        told.append(name)
        return True

    return tell


@contextmanager
def keep_process_state() -> Iterator[None]:
    """Restore on exit whether gradients are on, and what autocast is set to.

    A forward may switch them by functions (``torch.set_grad_enabled(False)``, ``torch.set_autocast_enabled``) and
    switch them back at its end, to which it does not come if an error, or whoever records it, stops it in between.
    """
    grad, cache = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    types = [kind for kind in _DEVICE_TYPES if torch.amp.is_autocast_available(kind)]
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types]
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for kind, enabled, dtype in casts:
            if (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) != (enabled, dtype):
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
