"""The losses of a net that is loaded, compared with those that its plan names; functions are not saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

from torch import nn

from sedona_fx.errors import DataError, PlanError
from sedona_fx.heads.objective import LocalLoss
from sedona_fx.ir.loss import NO_LOSS, loss_name, named_loss, same_loss
from sedona_fx.ir.outputs import Loss
from sedona_fx.plan import Plan


def loss_to_load(plan: Plan, loss: Loss | Literal["saved"] | None) -> Loss | None:
    """Return the loss of a net that is loaded, and warn if it is not the one that the net was saved with.

    Raises:
        PlanError: the saved one is asked for, and functions of the user's own are not saved.
    """
    if isinstance(loss, str):
        if loss != "saved":
            raise DataError(f"loss={loss!r} cannot be called: give a function loss(output, target) or None.")
        if plan.loss is None:
            return nn.functional.cross_entropy
        found = named_loss(plan.loss)
        if found is None and plan.loss != NO_LOSS:
            raise PlanError(
                f"the net was saved with the loss {plan.loss}, and functions are not saved: give it again, "
                "load(..., loss=...), or loss=None if the net is not to be trained."
            )
        return found
    if loss is not None and not callable(loss):
        raise DataError(f"loss={loss!r} cannot be called: give a function loss(output, target) or None.")
    if plan.loss is not None and not same_loss(plan.loss, loss_name(loss)):
        given = f"is loaded with {loss_name(loss)}" if loss is not None else "has none now: no schedule can train it"
        warnings.warn(f"the net was saved with the loss {plan.loss} and {given}.", UserWarning, stacklevel=4)
    return loss


def check_objectives(plan: Plan, objectives: Sequence[LocalLoss | None]) -> None:
    """Compare the local losses given for a net that is loaded with those that it was saved with.

    Raises:
        PlanError: the net had some, and none are given.
    """
    if plan.loss is None:
        return  # a plan from before losses were named
    saved = list(plan.local_losses or [None] * len(objectives))
    given = [loss_name(own.loss) if own is not None else None for own in objectives]
    if any(saved) and not any(given):
        raise PlanError(
            f"the net was saved with local losses of its own, {saved}, and functions are not saved: give them again, "
            "load(..., local_loss=...)."
        )
    if any((a is None) != (b is None) or not same_loss(a or "", b or "") for a, b in zip(saved, given, strict=True)):
        text = f"the net was saved with the local losses {saved} and is loaded with {given}; None is the net's loss."
        warnings.warn(text, UserWarning, stacklevel=4)
