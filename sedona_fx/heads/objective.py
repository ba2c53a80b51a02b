"""Local objectives of the user: what a block learns in place of the model's own task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sedona_fx.errors import HeadError
from sedona_fx.heads.context import HeadContext, HeadSpec

Objective = Callable[[Any, Mapping[str, Any], Any], Tensor]
"""``(head output, model inputs by argument name, target) -> scalar loss``."""


def activation_itself(context: HeadContext) -> nn.Module:
    """Return a head that passes the activation through unchanged, for losses that need no head."""
    return nn.Identity()


@dataclass(frozen=True)
class LocalLoss:
    """What a block learns: ``loss(head(activation), inputs, target)``, a scalar tensor.

    Examples are which classes are present (the backbone of a detector), reconstruction of the input, and the next
    token. The last block always keeps the model's own loss.

    Attributes:
        loss: called with the head's output, the model's inputs by argument name, and the target.
        head: a registered name, or a factory ``HeadContext -> nn.Module`` whose output may have any type and shape. By
            default, `loss` is given the activation itself.
    """

    loss: Objective
    head: HeadSpec = activation_itself


LocalLosses = LocalLoss | Sequence[LocalLoss | None] | None
"""One objective for all blocks, one for each block but the last (None: the model's own), or the model's own for all."""


def one_a_block(local_loss: LocalLosses, blocks: int) -> list[LocalLoss | None]:
    """Return the objective of each block but the last, in order; None stands for the model's own loss.

    Args:
        local_loss: what the user passed as ``local_loss=``; a single objective is used for every block.
        blocks: number of blocks, the last one included.

    Raises:
        HeadError: an element is not an objective, or their number is not ``blocks - 1``.
    """
    if local_loss is None or isinstance(local_loss, LocalLoss):
        return [local_loss] * (blocks - 1)
    if not isinstance(local_loss, Sequence) or not all(isinstance(item, LocalLoss | None) for item in local_loss):
        raise HeadError(f"local_loss={local_loss!r}: give a sedona_fx.LocalLoss, or a list with one (or None) a block.")
    if len(local_loss) != blocks - 1:
        raise HeadError(
            f"local_loss names {len(local_loss)} objectives; {blocks} blocks take {blocks - 1}: the last one keeps the "
            "model's own loss."
        )
    return list(local_loss)
