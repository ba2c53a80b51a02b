"""Find the line of the user's code that caused an error or a side effect while a forward pass is recorded."""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from sedona_fx.capture.state_watch import StateWatch
from sedona_fx.rng import random_states, same_stream_state, stream_state

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_PACKAGES = (os.path.dirname(torch.__file__), os.path.dirname(np.__file__), _PACKAGE)
_NOT_USERS = tuple(os.path.join(folder, "") for folder in _PACKAGES)
"""Folders of code that is not the user's: PyTorch, NumPy, and this package but for its reference nets."""
_MODELS = os.path.join(_PACKAGE, "models", "")

_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")


def user_line(error: BaseException) -> str:
    """Return the user's last line in a traceback, as ``", file.py line 12: `if x.sum() > 0:`"``; ``""`` without one."""
    return _last_user_line(traceback.extract_tb(error.__traceback__))


def current_line() -> str:
    """Return the line of the user's code that is running now, in the form of :func:`user_line`."""
    return _last_user_line(traceback.extract_stack())


def recorded_line(stack_trace: str) -> str:
    """Return the user's last line in the stack trace of a recorded operator, in the form of :func:`user_line`."""
    frames = [(file, int(number)) for file, number in re.findall(r'File "(.+?)", line (\d+)', stack_trace)]
    lines = [(file, number, linecache.getline(file, number).strip()) for file, number in frames if _is_users(file)]
    return "".join(f", {file} line {number}: `{line}`" for file, number, line in lines[-1:])


def module_running(model: nn.Module, frame: FrameType | None) -> str:
    """Return the path of the innermost module of a model whose own code runs in a frame; ``""`` for the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    while frame is not None:
        path = paths.get(id(frame.f_locals.get("self")))
        if path is not None:
            return path
        frame = frame.f_back
    return ""


def locate_side_effect(
    model: nn.Module, retrace: Callable[[], Any], watch: StateWatch | StreamWatch | None = None
) -> tuple[str, str]:
    """Trace again, comparing the state after every line of the user's code.

    Args:
        model: whose state is compared, and restored afterwards.
        retrace: traces the model.
        watch: what is compared; None: all of its state.

    Returns:
        The line that changed it, in the form of :func:`user_line`, or ``""``; and the path of the innermost module
        whose code that is.
    """
    guilty: list[tuple[str, str]] = []
    watch = watch if watch is not None else StateWatch(model)
    running: dict[FrameType, int] = {}  # the line that each frame is running

    def watch_lines(frame: FrameType, event: str, _: Any) -> Any:
        if guilty or not _is_users(frame.f_code.co_filename):
            return None
        # A line is guilty if the state changed while it ran, and no line of the user's that it called was found before.
        # Before it calls one, it is the line itself.
        suspect: FrameType | None = frame
        while event == "call" and suspect is not None and (suspect is frame or suspect not in running):
            suspect = suspect.f_back
        if suspect is not None and suspect in running and event in ("call", "line", "return") and watch.changed():
            file, number = suspect.f_code.co_filename, running[suspect]
            text = f", {file} line {number}: `{linecache.getline(file, number).strip()}`"
            guilty.append((text, module_running(model, suspect)))
        running[frame] = frame.f_lineno
        return watch_lines

    previous = sys.gettrace()
    sys.settrace(watch_lines)
    try:
        retrace()
    except Exception:  # a line that was found before the error is still right
        pass
    finally:
        sys.settrace(previous)
        watch.restore()
    return guilty[0] if guilty else ("", "")


class StreamWatch:
    """Says whether numbers were drawn from Python's or NumPy's generators, or from one among a model's attributes.

    PyTorch's own layers draw from PyTorch's: those draws are no part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [stream for stream, _ in StateWatch(model).streams]
        self._streams = [(stream, stream_state(stream)) for stream in own]
        self._random = random_states()[1:3]

    def changed(self) -> bool:
        """Whether numbers were drawn."""
        own = any(not same_stream_state(state, stream_state(stream)) for stream, state in self._streams)
        return own or random_states()[1:3] != self._random

    def restore(self) -> None:
        """Leave everything to :func:`~sedona_fx.capture.keep.keep_state`."""


def _is_users(filename: str) -> bool:
    """Whether a file is the user's: installed packages count, except for those of `_NOT_USERS`."""
    standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return filename.startswith(_MODELS) or (not standard and not filename.startswith((*_NOT_USERS, "<")))


def _last_user_line(stack: traceback.StackSummary) -> str:
    frames = [frame for frame in stack if frame.line and _is_users(frame.filename)]
    return f", {frames[-1].filename} line {frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
