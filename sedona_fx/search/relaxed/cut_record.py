"""What a relaxed training step records at each cut, so that one block's forward pass can be repeated later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sedona_fx.search.relaxed.vjp import Leaf


@dataclass(frozen=True)
class GeneratorStates:
    """States of PyTorch's global generators: to run a forward pass again with the same random draws (dropout).

    Attributes:
        devices: the accelerator whose state is kept besides the CPU's; empty on a CPU.
        states: the CPU's state, then one per device.
    """

    devices: list[torch.device]
    states: list[Tensor]

    @classmethod
    def now(cls, device: torch.device) -> GeneratorStates:
        """Return the present states of the CPU's generator and of `device`'s."""
        devices = [] if device.type in ("cpu", "meta") else [device]
        return cls(devices, [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)])

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the body from these states; afterwards the generators are in the states that they had before it."""
        device_type = self.devices[0].type if self.devices else "cuda"
        with torch.random.fork_rng(devices=self.devices, device_type=device_type):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            yield


@dataclass
class CutRecord:
    """What a relaxed training step found at cut i.

    Attributes:
        generators: states before block i ran.
        local_gradient: dl_i/dh_i, the gradient of the local loss at the boundary (times w, where cuts are sampled).
        upper_gradient: U_v = dLt_(i+1)/dv of every live value v that crosses the cut.
    """

    generators: GeneratorStates
    local_gradient: dict[Leaf, Tensor] = field(default_factory=dict)
    upper_gradient: dict[Leaf, Tensor] = field(default_factory=dict)
