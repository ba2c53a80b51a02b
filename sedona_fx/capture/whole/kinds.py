"""Modules that symbolic tracing cannot look into, and so keeps whole without being asked to."""

from __future__ import annotations

import torch
from torch import nn

from sedona_fx.ir.late_buffers import is_observer


def stays_whole(module: nn.Module) -> bool:
    """Whether a module becomes one node although it is no layer of ``torch.nn``.

    TorchScript has no Python code to record. Fake quantizers and observers branch on numbers in their buffers, and
    resize these.
    """
    return isinstance(module, torch.jit.ScriptModule) or is_observer(module)
