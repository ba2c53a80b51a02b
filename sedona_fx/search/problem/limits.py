"""Limits on a plan: bytes, FLOPs and seconds of its largest block, and FLOPs of its heads.

``decouple(budget=...)`` sets them. They do not limit what a search itself costs: that is a setting of the search
(:class:`~sedona_fx.search.sedona.search_cost.SearchCost` counts it).
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
"""What can be limited -> its unit. All but ``head_flops`` are costs of the largest block."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a plan may cost, for a batch like the first one of the data; None: no limit.

    Attributes:
        activation_bytes: of the block that saves most for its backward pass, its head included: the largest number in
            the column "activations" of ``print(net)``, and what a step of ``Greedy`` needs at a time.
        block_flops: FLOPs of the forward pass of the largest block, its head included.
        block_seconds: seconds of the forward and backward pass of the slowest block, its head included, on this
            machine. Each stretch between places to cut and each candidate head is measured once, and these seconds are
            added up. The optimizer's step is not included.
        head_flops: FLOPs of the forward pass of all heads together.
        measured: the seconds that an earlier decision was based on (``plan.block_seconds``). They are used in place of
            new measurements, so that the decision is the same again.

    Raises:
        CutError: a limit is not a number, is NaN or is below 0, or `measured` is not of the form that
            ``plan.block_seconds`` has.
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
            # As a number of Python's own: a plan is saved as JSON, which takes no NumPy scalars.
            object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))
        measured = self.measured
        if measured and not (isinstance(measured, Mapping) and {"places", "stretches", "heads"} <= measured.keys()):
            raise CutError(
                "the budget's measured=... should be what a plan has in block_seconds: an object with places, "
                "stretches and heads. Leave it out to measure anew."
            )

    @classmethod
    def of(cls, budget: Limits | Mapping[str, Any] | None, plan: Plan | None = None) -> Limits | None:
        """Return the limits that a user's ``budget=`` sets, or None if it sets none.

        Args:
            budget: limits, or a mapping of their names to numbers.
            plan: the plan that is applied, if any; its measured seconds are used unless `budget` has its own.

        Raises:
            CutError: `budget` is neither limits nor a mapping, or names something that cannot be limited.
        """
        if isinstance(budget, Mapping):
            names = [field.name for field in fields(cls)]
            for name in budget:
                if name not in names:
                    near = did_you_mean(str(name), names)
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
        """Return the limits that are set: name -> number, in the unit of :data:`MEASURES`."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}


def amount(measure: str, value: float) -> str:
    """Return a value of a measure as error messages show it: ``123,456``, or for seconds ``0.0123``."""
    return f"{value:.3g}" if measure == "block_seconds" else f"{math.ceil(value):,}"
