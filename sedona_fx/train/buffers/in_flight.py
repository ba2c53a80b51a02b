"""Batches in flight: what blocks keep of a batch between its forward pass and its delayed backward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sedona_fx.data.sources import to_device
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.runtime.run import Values


@dataclass
class Held:
    """What a block keeps of a batch until its gradient arrives.

    Attributes:
        inputs: what the block read, by name.
        exports: with stashed weights, what it exported, with its graph.
        weights: with stashed weights, the copies of the parameters that it ran on, to make the graph again.
        buffers: with stashed weights, copies of the buffers from before it ran, to make the graph again.
    """

    inputs: Values
    exports: Values = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the exports: a graph cannot be saved, but it can be made again from the rest."""
        inputs = {name: map_tensors(Tensor.detach, value) for name, value in self.inputs.items()}
        return {"inputs": inputs, "weights": self.weights, "buffers": self.buffers}


@dataclass
class Flight:
    """A batch between its forward pass and the last of its backward passes.

    Attributes:
        step: number of the training step of its forward pass.
        training: the net's mode in that step.
        held: for each block, what it keeps of the batch; None before its forward pass and after its backward pass.
        gradients: the gradients that later blocks have computed for earlier ones, by the name of the value, unscaled.
    """

    step: int
    training: bool
    held: list[Held | None]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def abandon(self) -> None:
        """Drop what is kept of the batch, so that no block runs backward for it."""
        self.held, self.gradients = [None] * len(self.held), {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; loads with ``weights_only=True``."""
        return {
            "step": self.step,
            "training": self.training,
            "gradients": dict(self.gradients),
            "held": [held.state_dict() if held is not None else None for held in self.held],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], devices: Iterable[torch.device]) -> Flight:
        """Return the flight that a state is of, without the exports of its blocks; it shares no tensor with the state.

        Args:
            state: what :meth:`state_dict` returned.
            devices: for each block, where its inputs go.
        """
        state = copy.deepcopy(state)
        held = [
            Held(**{**saved, "inputs": to_device(saved["inputs"], device)}) if saved is not None else None
            for device, saved in zip(devices, state["held"], strict=True)
        ]
        return cls(state["step"], state["training"], held, dict(state["gradients"]))
