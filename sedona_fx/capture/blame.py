"""Which line of the user's code is to blame for an error or a side effect while a forward is recorded."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from sedona_fx.capture.state_watch import StateWatch

_NOT_USERS = tuple(os.path.join(os.path.dirname(f), "") for f in (torch.__file__, np.__file__, __file__))


_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")


def user_line(error: BaseException) -> str:
    """Return ``", file.py line 12: `if x.sum() > 0:`"`` for the user's own last line in a traceback."""
    return _line(traceback.extract_tb(error.__traceback__))


def current_line() -> str:
    """Return the same for the line of the user's that is running now."""
    return _line(traceback.extract_stack())


def locate_side_effect(model: nn.Module, retrace: Callable[[], Any]) -> str:
    """Trace once more, looking at the state after every line of the user's code; return the guilty line in words."""
    found: list[str] = []
    watch = StateWatch(model)
    last: dict[FrameType, int] = {}

    def watch_lines(frame: FrameType, event: str, _: Any) -> Any:
        if found or not _is_users(frame.f_code.co_filename):
            return None
        # A line is guilty if the state changed while it ran and no deeper line of the user's was blamed before.
        if frame in last and event in ("line", "return") and watch.changed():
            line = linecache.getline(frame.f_code.co_filename, last[frame]).strip()
            found.append(f", {frame.f_code.co_filename} line {last[frame]}: `{line}`")
        last[frame] = frame.f_lineno
        return watch_lines

    previous = sys.gettrace()
    sys.settrace(watch_lines)
    try:
        retrace()
    except Exception:  # what was found until then stands
        pass
    finally:
        sys.settrace(previous)
        watch.restore()
    return found[0] if found else ""


def _is_users(filename: str) -> bool:
    standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return not standard and not filename.startswith((*_NOT_USERS, "<"))


def _line(stack: traceback.StackSummary) -> str:
    frames = [frame for frame in stack if frame.line and _is_users(frame.filename)]
    return f", {frames[-1].filename} line {frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
