"""Check the saved state of an optimizer before it is loaded: PyTorch itself compares the sizes of groups alone."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.files import LARGEST_COUNT

_ON_DEVICES = {"foreach": False, "fused": None, "capturable": False}  # how to run, without influence on the state


def counted_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of an optimizer; it also names the parameters that there is state of (``"held"``)."""
    state = optimizer.state_dict()
    return {**state, "held": sorted(state["state"])}


def load_counted(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a copy of what :func:`counted_state` returned, or of a plain state dict.

    PyTorch would take over the very tensors of a state that is on the right device: training would change it.
    """
    optimizer.load_state_dict({name: copy.deepcopy(value) for name, value in state.items() if name != "held"})


def optimizer_fault(optimizer: torch.optim.Optimizer, saved: Any) -> str:
    """Return why a state does not fit an optimizer, in words, or ``""`` if it does.

    Of PyTorch's own optimizers every entry of the state is compared with one that a step on zeros makes.

    Args:
        optimizer: the optimizer that is to load the state; it is left as it is.
        saved: the state, from :func:`counted_state` or as the optimizer itself gives it.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return "it is no state of an optimizer"
    groups, ours = saved.get("param_groups"), optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        return "it has no parameter groups"
    sizes = [[len(group["params"]) for group in of] for of in (ours, groups)]
    if sizes[0] != sizes[1]:
        return f"it has parameter groups of {sizes[0]} here and {sizes[1]} in the state"
    for group, here in zip(groups, ours, strict=True):
        if group["params"] != here["params"]:
            return "its parameters are numbered otherwise"
        if fault := _group_fault(group, here):
            return fault
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [k for group in ours for k in group["params"]]
    if unknown := [k for k in saved["state"] if type(k) is not int or k not in numbers]:
        return f"it has state of a parameter {unknown[0]!r} that is not there"
    held = saved.get("held")  # not in files from before it was written
    if held is not None and held != sorted(saved["state"]):
        return f"it has state of {len(saved['state'])} parameters, and had state of {_count(held)} when it was saved"
    group_of = {k: group for group in groups for k in group["params"]}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            fault = _entry_fault(optimizer, saved["state"][number], parameter, group_of[number])
            if fault:
                return f"its state of parameter {number}, of shape {tuple(parameter.shape)}, {fault}"
    return ""


def _count(held: Any) -> Any:
    return len(held) if isinstance(held, list) else f"{held!r}"


def _group_fault(group: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what is wrong with the settings of a parameter group; flags, which newer versions add, may be missing."""
    for name, ours in here.items():
        if name == "params":
            continue
        plain = ours is None or isinstance(ours, bool)
        if name not in group:
            if plain:
                continue
            return f"its setting {name!r} is missing"
        theirs = group[name]
        if _numbers(ours) is not None and not plain:
            found = _numbers(theirs)
            if found is None or len(found) != len(_numbers(ours) or []) or not all(map(math.isfinite, found)):
                return f"its setting {name!r} is {str(theirs)[:50]} there and {str(ours)[:50]} here"
        if name == "lr" and min(_numbers(theirs) or [0.0]) < 0:
            return f"its learning rate is {theirs}"
    return ""


def _numbers(value: Any) -> list[float] | None:
    """Return a setting that is one number or several, as a list; None if it is something else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        return [float(value)]
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in items) else None


def _entry_fault(optimizer: torch.optim.Optimizer, entry: Any, parameter: Tensor, group: Mapping[str, Any]) -> str:
    """Return what is wrong with the state of one parameter."""
    if not isinstance(entry, dict):
        return f"is {type(entry).__name__}"
    if "step" in entry and entry["step"] is not None:
        step = _numbers(entry["step"])
        if step is None or len(step) != 1 or not 0 <= step[0] < LARGEST_COUNT or step[0] != int(step[0]):
            return f"has the step {str(entry['step'])[:50]}, which is no number of steps"
    expected = _after_a_step(optimizer, parameter, group)
    if expected is None:
        return ""
    for name in sorted(expected.keys() | entry.keys(), key=str):
        if name not in entry or name not in expected:
            return (
                f"has no {name!r}" if name not in entry else f"has {name!r}, which {type(optimizer).__name__} has not"
            )
        if isinstance(entry[name], Tensor) and entry[name].is_meta:
            return f"has {name!r} without data"
        ours, theirs = _described(expected[name]), _described(entry[name])
        if ours != theirs:
            return f"has {name!r} as {theirs}, which should be {ours}"
    return ""


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "a number" if isinstance(value, (int, float)) else type(value).__name__
    if value.dim() == 0:  # a counter, of one dtype or another, depending on how the optimizer runs
        return "a number"
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{layout}"


def _after_a_step(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the state that one of PyTorch's optimizers has of a parameter after a step; None if that is not known."""
    kind: Any = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        return None
    names = inspect.signature(kind).parameters
    settings = {
        **{k: v for k, v in group.items() if k in names},
        **{k: v for k, v in _ON_DEVICES.items() if k in names},
    }
    settings.pop("params", None)
    for device in ("meta", "cpu"):  # some optimizers read numbers, which tensors without data do not have
        try:
            twin = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype, device=device))
            twin.grad = torch.zeros_like(twin)
            probe = kind([twin], **settings)
            probe.step()
        except Exception:  # an optimizer that is not made like the others
            continue
        state: Mapping[str, Any] = probe.state[twin]
        return state
    return None
