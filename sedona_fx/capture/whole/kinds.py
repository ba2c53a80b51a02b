"""Modules that a front end cannot look into, and so keeps whole without being asked to."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from sedona_fx.capture.whole.late_buffers import is_observer


def stays_whole(module: nn.Module) -> bool:
    """Whether a module becomes one node although it is no layer of ``torch.nn``.

    TorchScript has no Python code to record. Fake quantizers and observers branch on numbers in their buffers, and
    resize these.
    """
    return isinstance(module, torch.jit.ScriptModule) or is_observer(module)


def whole_in_export(model: nn.Module, leaves: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules of a model that an exported program has as one node each, none inside of another.

    Besides those that symbolic tracing keeps whole, these are norms with a cumulative average (``momentum=None``): how
    far one moves its statistics is one over a number in a buffer.

    Args:
        model: the model.
        leaves: modules that the user keeps whole.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        counts = isinstance(module, _NormBase) and module.momentum is None
        if module is not model and module not in inside and (counts or module in leaves or stays_whole(module)):
            found.append(module)
            inside.update(module.modules())
    return found
