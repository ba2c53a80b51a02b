"""Seconds of a training step of every stretch between places to cut, and of every candidate head: measured once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx import passes
from sedona_fx.errors import DataError
from sedona_fx.heads.registry import build_head, head_name
from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.measure import step_seconds
from sedona_fx.runtime.run import run_graph
from sedona_fx.search.problem.problem import Problem

_REPEATS = 5


def measure_seconds(problem: Problem, places: Sequence[str]) -> dict[str, Any]:
    """Return seconds of forward and backward, on the example batch: medians of five runs, all interleaved.

    A stretch gives its input's gradient, as it does inside a block. Heads of one kind on activations of one shape are
    measured once. The model's buffers, its gradients and the random streams stay as they are.

    Returns:
        ``{"places": places, "stretches": [n + 1 seconds], "heads": {place: {name of a candidate: seconds}}}``.

    Raises:
        DataError: the problem has no example batch.
    """
    if not problem.analysed.example.kwargs:
        raise DataError("block_seconds is measured on the first batch of the data, and this problem has none.")
    cuts: dict[str, list[nn.Module]] = {str(info(problem.node(place)).cut): [] for place in places}
    parts = passes.partition(passes.lower_at(problem.train, cuts))
    modules = copy.deepcopy([part.module for part in parts])  # together: what they share stays shared
    every = nn.ModuleList(modules)
    device = next(every.parameters()).device
    runs: dict[str, Callable[[], None]] = {}
    keys: dict[str, dict[str, str]] = {}
    with torch.random.fork_rng():
        values = dict(problem.analysed.example.kwargs)
        for part, module in zip(parts, modules, strict=True):
            own = replace(part, module=module)
            runs[f"stretch {part.index}"] = _stretch(own, {name: values[name] for name in part.inputs}, device)
            with torch.no_grad():
                values |= run_graph(own, _copies(values))[0]
        for place in places:
            record, context = info(problem.node(place)), problem.contexts[place]
            keys[place] = {}
            for spec in problem.candidates[place]:
                key = f"head {spec!r} {record.value} {replace(context, place='')}"
                keys[place][head_name(spec)] = key
                if key not in runs:
                    like = values[record.site]
                    runs[key] = _head(build_head(spec, context).to(device, like.dtype), like, device)
        with torch.enable_grad():
            seconds = step_seconds(runs, _REPEATS)
    return {
        "places": list(places),
        "stretches": [seconds[f"stretch {part.index}"] for part in parts],
        "heads": {place: {name: seconds[key] for name, key in names.items()} for place, names in keys.items()},
    }


def _stretch(part: BlockGraph, given: Mapping[str, Any], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        _backward(run_graph(part, _copies(given)), device)

    return run


def _head(head: nn.Module, activation: Tensor, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        _backward(head(_copies({"": activation})[""]), device)

    return run


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs that ask for a gradient and may be overwritten."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.is_floating_point()).clone()

    return pytree.tree_map(fresh, dict(values))


def _backward(outputs: Any, device: torch.device) -> None:
    """Walk back from all outputs at once, and wait for the device."""
    ends = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
