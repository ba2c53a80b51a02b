"""What an auxiliary head has to fit, and the ways to name one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class HeadContext:
    """What a head has to fit.

    `shape` is the activation at the cut and `output_shape` the model's primary output, both with the batch first. The
    size of the batch is an example: a head must serve any. `channel_dim` holds the channels or features: 1 in (N, C, H,
    W) and (N, D), -1 or 2 in tokens (N, T, D), -1 or 3 in (N, H, W, D). `place` is the user's module path. `token`: the
    model's own output reads only this token of (N, T, D) activations (a class token: 0; the last: -1); None where it
    does not.
    """

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_dim: int = 1
    place: str = ""
    token: int | None = None
    free_output: bool = False

    @property
    def channels(self) -> int:
        """Number of channels or features."""
        return self.shape[self.channel_dim]

    @property
    def positions(self) -> tuple[int, ...]:
        """The sizes without batch and channels: (H, W) of an image, (T,) of tokens, () of a vector."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, self.channel_dim % len(self.shape)))

    @property
    def channels_first(self) -> bool:
        """Whether the channels are in dimension 1."""
        return self.channel_dim % len(self.shape) == 1

    @property
    def is_vector(self) -> bool:
        """Whether the activation is (N, D)."""
        return len(self.shape) == 2

    @property
    def is_image(self) -> bool:
        """Whether the activation is (N, C, H, W)."""
        return len(self.shape) == 4 and self.channels_first


HeadFactory = Callable[[HeadContext], nn.Module]


HeadSpec = str | HeadFactory
