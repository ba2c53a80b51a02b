"""What an auxiliary head is built for, and the two ways to specify one: a registered name or a factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from sedona_fx.heads.rows import Arrangement


class HeadDtypes(NamedTuple):
    """The dtypes of the activation, of the head's own weights, and of the model's primary output."""

    activation: torch.dtype
    weights: torch.dtype
    output: torch.dtype


class NoOutput(NamedTuple):
    """Why no head can give what the model gives, and what can be done instead; both for messages."""

    reason: str
    instead: str


@dataclass(frozen=True)
class HeadContext:
    """The activation that an auxiliary head reads and the output that it must produce.

    The batch is the first dimension of both shapes, wherever the model itself has it: a head gets its activation so,
    and what it gives is put into the model's form. The size of the batch is an example: a head must accept any.

    Attributes:
        shape: shape of the activation at the cut.
        output_shape: shape of the model's primary output.
        channel_dim: the dimension of `shape` that holds the channels or features: 1 for (N, C, H, W) and (N, D), -1 or
            2 for tokens (N, T, D), -1 or 3 for (N, H, W, D).
        place: the cut as a module path of the user's model, for error messages.
        token: index of the single token of an (N, T, D) activation that the model's own output depends on (0 for a
            class token, -1 for the last token); None if the output does not depend on a single token.
        dtypes: the dtypes that the head reads, computes in and gives; None: all are that of the model.
        free_output: whether the head's output may have any type and shape, since a loss of the user's own reads it.
        arrangement: what is done before and behind the head, since the model does not have the batch first; a head need
            not look at it. None: nothing.
        no_output: why no head can give the model's output, whatever the head; None if one may.
    """

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_dim: int = 1
    place: str = ""
    token: int | None = None
    free_output: bool = False
    dtypes: HeadDtypes | None = None
    arrangement: Arrangement | None = None
    no_output: NoOutput | None = None

    @property
    def channels(self) -> int:
        """Number of channels or features."""
        return self.shape[self.channel_dim]

    @property
    def positions(self) -> tuple[int, ...]:
        """The sizes other than batch and channels: (H, W) for an image, (T,) for tokens, () for a vector."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, self.channel_dim % len(self.shape)))

    @property
    def channels_first(self) -> bool:
        """Whether dimension 1 holds the channels."""
        return self.channel_dim % len(self.shape) == 1

    @property
    def is_complex(self) -> bool:
        """Whether the activation is of complex numbers."""
        return self.dtypes is not None and self.dtypes.activation.is_complex

    @property
    def is_vector(self) -> bool:
        """Whether the activation is (N, D)."""
        return len(self.shape) == 2

    @property
    def is_image(self) -> bool:
        """Whether the activation is (N, C, H, W)."""
        return len(self.shape) == 4 and self.channels_first


HeadFactory = Callable[[HeadContext], nn.Module]
"""Builds a module that maps `HeadContext.shape` to `HeadContext.output_shape`, for any batch size."""

HeadSpec = str | HeadFactory
"""A head, as the name that it is registered under or as a factory."""
