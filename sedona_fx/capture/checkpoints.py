"""Reentrant checkpoints (``torch.utils.checkpoint``, ``use_reentrant=True``) while a forward is recorded or proven.

Such a checkpoint runs its function under ``no_grad``, and again in backward. Recorded as it is, its layers would be
frozen; so the function itself is recorded. What a checkpoint saves in memory is not in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from sedona_fx.capture.blame import current_line


@contextmanager
def plain_checkpoints() -> Iterator[list[str]]:
    """Let reentrant checkpoints call their function directly in the body.

    Yields:
        A list that gets the user's line of every checkpoint none of whose inputs needs a gradient. Such a checkpoint
        gives no gradient to the layers inside of it.
    """
    without_gradient: list[str] = []

    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.arg_tree_leaves(*args)):
            without_gradient.append(current_line())
        return function(*args)

    CheckpointFunction.apply = staticmethod(apply)
    try:
        yield without_gradient
    finally:
        del CheckpointFunction.apply
