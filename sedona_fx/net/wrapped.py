"""Nets inside of what ``torch.compile`` returns, which has the net's parameters but not its methods."""

from __future__ import annotations

from typing import Any

from torch import nn

from sedona_fx.errors import ScheduleError
from sedona_fx.ir.modules import unwrapped
from sedona_fx.net.net import Net


def require_net(net: Any, who: str) -> None:
    """Check that `who` gets a net itself.

    Raises:
        ScheduleError: it is something else, or a net inside of what ``torch.compile`` returns.
    """
    if isinstance(net, Net):
        return
    inside = isinstance(net, nn.Module) and isinstance(unwrapped(net), Net)
    advice = "hand over the net inside, ._orig_mod" if inside else "make one with decouple"
    raise ScheduleError(f"{who} takes a net, not {type(net).__name__}: {advice}.")
