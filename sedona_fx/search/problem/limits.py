"""Limits on a plan: bytes, FLOPs and seconds of its largest block, FLOPs of its heads.

What ``decouple`` calls the budget of the plan. What a search itself may cost is another matter, and is set in the
search (:class:`~sedona_fx.search.sedona.budget.Budget` counts it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from sedona_fx.errors import CutError, did_you_mean
from sedona_fx.plan import Plan

MEASURES = {"activation_bytes": "bytes", "block_flops": "FLOPs", "block_seconds": "seconds", "head_flops": "FLOPs"}
"""What can be limited, each with its unit; all but ``head_flops`` are about the largest block."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan may cost at most, for a batch like the first of the data; None: any.

    Attributes:
        activation_bytes: of the block that keeps most for its backward pass, its head included: the largest number in
            the column "activations" of ``print(net)``, and what a step of ``Greedy`` needs at once.
        block_flops: forward FLOPs of the largest block, its head included.
        block_seconds: forward and backward of the slowest block, its head included, measured on this machine: each
            stretch between places to cut once, each candidate head once, and added up. The optimizer's step is not in
            it.
        head_flops: forward FLOPs of all heads together.
        measured: seconds as an earlier decision measured them (``plan.block_seconds``), used instead of new ones, so that
            the decision is the same.
    """

    activation_bytes: float | None = None
    block_flops: float | None = None
    block_seconds: float | None = None
    head_flops: float | None = None
    measured: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or value < 0:
                raise CutError(f"the budget's {name}={value!r} should be a number of {MEASURES[name]}, at least 0.")
            # As Python's own number: a plan's JSON has no others.
            object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))
        known = self.measured
        if known and not (isinstance(known, Mapping) and {"places", "stretches", "heads"} <= known.keys()):
            raise CutError(
                "the budget's measured=... should be what a plan has in block_seconds: an object with places, stretches "
                "and heads. Leave it out to measure anew."
            )

    @classmethod
    def of(cls, budget: Limits | Mapping[str, Any] | None, plan: Plan | None = None) -> Limits | None:
        """Return limits from what a user gives, with the seconds that a plan had measured; None if nothing is limited.

        Raises:
            CutError: neither limits nor a mapping, or one with another key.
        """
        if isinstance(budget, Mapping):
            known = [field.name for field in fields(cls)]
            for name in budget:
                if name not in known:
                    near = did_you_mean(str(name), known)
                    raise CutError(
                        f"the budget names {name!r}, which cannot be limited{near}; one of {list(MEASURES)}."
                    )
            budget = cls(**budget)
        if budget is not None and not isinstance(budget, cls):
            raise CutError(
                f"budget={budget!r} is neither sedona_fx.Limits(...) nor a mapping such as "
                "{'activation_bytes': 50_000_000}."
            )
        if budget is None or not budget.given():
            return None
        if budget.measured is None and plan is not None:
            return replace(budget, measured=plan.block_seconds)
        return budget

    def given(self) -> dict[str, float]:
        """Return the limits that were set, by name."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}


def amount(measure: str, value: float) -> str:
    """Return a value as error messages write it: ``123,456`` or ``0.0123``."""
    return f"{value:.3g}" if measure == "block_seconds" else f"{math.ceil(value):,}"
