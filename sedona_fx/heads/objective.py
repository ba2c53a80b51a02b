"""Objectives of the user's own: what a block learns instead of the model's task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sedona_fx.errors import HeadError
from sedona_fx.heads.context import HeadContext, HeadFactory

Objective = Callable[[Any, Mapping[str, Any], Any], Tensor]


def activation_itself(context: HeadContext) -> nn.Module:
    """Return a head that hands the activation on, for losses that need none."""
    return nn.Identity()


@dataclass(frozen=True)
class LocalLoss:
    """What a block learns: ``loss(head(activation), inputs, target)``, a scalar tensor.

    For a detector's backbone, which classes are present; reconstruction of the input; the next token. The last block
    keeps the model's own loss.

    Attributes:
        loss: gets the head's output, the model's inputs by argument name, and the target.
        head: a registered name, or a factory ``HeadContext -> nn.Module`` whose output may have any form; left out, the
            loss gets the activation.
    """

    loss: Objective
    head: str | HeadFactory = activation_itself


LocalLosses = LocalLoss | Sequence[LocalLoss | None] | None


def one_a_block(local_loss: LocalLosses, blocks: int) -> list[LocalLoss | None]:
    """Return the objective of every block but the last; None is the model's own.

    Raises:
        HeadError: not an objective, or not as many as there are blocks with a head.
    """
    given = [local_loss] * (blocks - 1) if local_loss is None or isinstance(local_loss, LocalLoss) else local_loss
    if not isinstance(given, Sequence) or not all(one is None or isinstance(one, LocalLoss) for one in given):
        raise HeadError(f"local_loss={local_loss!r}: give a sedona_fx.LocalLoss, or a list with one (or None) a block.")
    if len(given) != blocks - 1:
        raise HeadError(
            f"local_loss names {len(given)} objectives; {blocks} blocks take {blocks - 1}: the last one keeps the "
            "model's own loss."
        )
    return list(given)
