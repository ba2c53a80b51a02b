"""Single arguments of ``decouple``, checked and in the form that the compiler takes: plan, devices, sizes, search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sedona_fx.data.args import Args
from sedona_fx.errors import CutError, DataError, PlanError, did_you_mean
from sedona_fx.passes.trace import Dynamic
from sedona_fx.plan import Plan
from sedona_fx.search import SEARCHES, Search


def given_plan(plan: Any) -> Plan | None:
    """Return a plan, or the plan in a file."""
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    if plan is None or isinstance(plan, Plan):
        return plan
    raise PlanError(
        f"plan={plan!r} is neither a Plan nor the path of one: give net.plan, or a file that plan.save(path) wrote."
    )


def dynamic_of(dynamic: Any, example: Args) -> Dynamic:
    """Return the sizes that have to be free, after a look at the names and dimensions.

    Raises:
        DataError: an input or a dimension is not there.
    """
    if dynamic is None or dynamic is False:
        return dynamic
    if not isinstance(dynamic, Mapping):
        raise DataError(f"dynamic={dynamic!r}: give a mapping such as {{'ids': [1]}}, False, or None.")
    checked = {}
    for name, dims in dynamic.items():
        tensor = example.kwargs.get(name)
        if not isinstance(tensor, torch.Tensor):
            near = did_you_mean(str(name), example.kwargs)
            raise DataError(f"dynamic= names {name!r}, which is no tensor among the inputs{near}.")
        checked[name] = tuple([dims] if isinstance(dims, int) else dims)
        for dim in checked[name]:
            if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < tensor.dim():
                raise DataError(f"dynamic={{{name!r}: {dims!r}}}: {name} has the dimensions 0 to {tensor.dim() - 1}.")
    return checked


def device_names(devices: Sequence[str | torch.device] | None, blocks: int) -> tuple[str, ...] | None:
    """Return the devices as a plan names them, after trying each of them.

    Raises:
        PlanError: there is not one device for each block, or one cannot be used.
    """
    if devices is None:
        return None
    if isinstance(devices, (str, torch.device)) or len(devices) != blocks:
        count = "one device" if isinstance(devices, (str, torch.device)) else f"{len(devices)} devices"
        raise PlanError(f"devices={devices!r} names {count} for {blocks} blocks: give a list with one a block.")
    for device in devices:
        try:
            torch.empty(0, device=device)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise PlanError(
                f"devices names {str(device)!r}, which cannot be used here: {reason.rstrip('.')}. Name devices of this "
                "machine, or leave out devices=."
            ) from None
    return tuple(str(device) for device in devices)


def search_of(search: str | Search) -> Search:
    """Return the search that a name stands for, or the search itself."""
    if isinstance(search, str):
        if search not in SEARCHES:
            raise CutError(
                f"search={search!r} is not known{did_you_mean(search, SEARCHES)}; one of {sorted(SEARCHES)}."
            )
        return SEARCHES[search]()
    if not isinstance(search, Search):
        raise CutError(
            f"search={search!r} is no search: one of {sorted(SEARCHES)}, or an object with decide(problem), made of a "
            "subclass of sedona_fx.search.Search."
        )
    return search
