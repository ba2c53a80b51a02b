"""Measured seconds of a training step of every stretch between places to cut, and of every candidate head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import DataError
from sedona_fx.heads.registry import build_head, head_name
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.cost import gradient_reach
from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.measure import step_seconds
from sedona_fx.runtime.run import run_graph
from sedona_fx.search.problem.problem import Problem
from sedona_fx.search.problem.stretches import cut_into_stretches

_REPEATS = 5


def measure_seconds(problem: Problem, places: Sequence[str]) -> dict[str, Any]:
    """Measure the forward and backward pass of every stretch and every candidate head on the example batch.

    Each number is the median of five runs; the runs of all parts are interleaved. A stretch computes the gradient of
    its input too, as it does inside a block, unless nothing but frozen parameters comes before it. Heads of one kind on
    activations of one shape are measured once. The model's buffers and gradients and the global random states are left
    as they are.

    Args:
        problem: the net and its candidate heads.
        places: the n cut points to choose from, in order.

    Returns:
        Seconds, in the form of ``plan.block_seconds``:
        ``{"places": places, "stretches": [n + 1 numbers], "heads": {place: {head's name: number}}}``.

    Raises:
        DataError: the problem has no example batch.
    """
    if not problem.analysed.example.kwargs:
        raise DataError("block_seconds is measured on the first batch of the data, and this problem has none.")
    parts = cut_into_stretches(problem.train, [problem.node(place) for place in places])
    modules = deep_copy([part.module for part in parts])  # in one call: modules that parts share stay shared
    device = next(nn.ModuleList(modules).parameters()).device
    runs: dict[str, Callable[[], None]] = {}
    without_gradient = _frozen_values(problem.train.graph)
    head_keys: dict[str, dict[str, str]] = {}  # place -> head's name -> key in `runs`
    with torch.random.fork_rng():
        values = dict(problem.analysed.example.kwargs)
        for part, module in zip(parts, modules, strict=True):
            part_copy = replace(part, module=module)
            inputs = {name: values[name] for name in part.inputs}
            runs[f"stretch {part.index}"] = _stretch_step(part_copy, inputs, without_gradient, device)
            with torch.no_grad():
                values |= run_graph(part_copy, _copies(values))[0]
        for place in places:
            record, context = info(problem.node(place)), problem.contexts[place]
            head_keys[place] = {}
            for spec in problem.candidates[place]:
                key = f"head {spec!r} {record.value} {replace(context, place='')}"
                head_keys[place][head_name(spec)] = key
                if key not in runs:
                    activation = values[record.site]
                    head = build_head(spec, context).to(device, activation.dtype)
                    runs[key] = _head_step(head, activation, device)
        with torch.enable_grad():
            seconds = step_seconds(runs, _REPEATS)
    return {
        "places": list(places),
        "stretches": [seconds[f"stretch {part.index}"] for part in parts],
        "heads": {place: {name: seconds[key] for name, key in keys.items()} for place, keys in head_keys.items()},
    }


def _frozen_values(graph: fx.Graph) -> set[str]:
    """Return the names of the values that no gradient is taken of in a net with frozen parameters; else none."""
    reach = gradient_reach(graph, dict.fromkeys(graph.nodes, 0))
    inputs = [node for node in graph.nodes if node.op == "placeholder"] if reach else []
    return {str(node.target) for node in inputs} | {info(node).site for node in reach}


def _stretch_step(
    part: BlockGraph, inputs: Mapping[str, Any], without_gradient: Collection[str], device: torch.device
) -> Callable[[], None]:
    def run() -> None:
        _backward(run_graph(part, _copies(inputs, without_gradient)), device)

    return run


def _head_step(head: nn.Module, activation: Tensor, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        _backward(head(_copies({"": activation})[""]), device)

    return run


def _copies(values: Mapping[str, Any], without_gradient: Collection[str] = ()) -> dict[str, Any]:
    """Return copies of inputs that require a gradient, but for those named, and may be overwritten in place."""

    def fresh(value: Any, name: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        wanted = value.is_floating_point() and name not in without_gradient
        # The clone is not a leaf: autograd refuses in-place operators on leaves that require a gradient.
        return value.detach().requires_grad_(wanted).clone()

    return {name: pytree.tree_map(lambda leaf, name=name: fresh(leaf, name), value) for name, value in values.items()}


def _backward(outputs: Any, device: torch.device) -> None:
    """Backpropagate from all outputs in one call, with cotangents of ones, and wait for the device."""
    roots = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
