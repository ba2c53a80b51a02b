"""Try the model's loss on what a head gives, and name the fields of the output that it misses there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedona_fx.errors import DataError
from sedona_fx.ir.outputs import Key, Loss, OutputFormat, fields


def check_head_output(form: OutputFormat, output: Any, target: Any, loss: Loss) -> None:
    """Try the loss on what a head gives: the primary output in the model's output type, all other fields None.

    Args:
        form: how the loss sees what the model returns.
        output: what the model returns, which the loss takes.
        target: of the examples that this output is of.
        loss: ``loss(output, target)``.

    Raises:
        DataError: the loss cannot take that; names the fields that it reads.
    """
    given = dict(fields(output))

    def reason(values: Mapping[Key, Any]) -> str:
        """Return why the loss cannot take an output with these fields, or ``""`` if it can."""
        try:
            with torch.no_grad():
                value = loss(form.wrap(given[form.key], values), target)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if isinstance(value, Tensor) and value.dim() == 0:
            return ""
        return f"it returns {type(value).__name__ if not isinstance(value, Tensor) else tuple(value.shape)}"

    why = reason({})
    if not why:
        return
    others = {key: value for key, value in given.items() if key != form.key and value is not None}
    read = [key for key in others if reason({k: v for k, v in others.items() if k != key})]
    names = ", ".join(map(repr, read or others))
    raise DataError(
        f"the loss reads {names} of the output, which no head gives: a head imitates the primary output "
        f"({form.key!r}), and every other field is None then ({why.rstrip('.')}). Write the loss on that field alone, "
        "or leave out fields that are None; name another primary output with output=...; give blocks with heads an "
        "objective of their own, local_loss=sedona_fx.LocalLoss(loss, head); or take heads=False, for Backprop and "
        "Delayed."
    )
