"""One block of the relaxed net on its way up: run it, take its local loss, and say where its part of the graph lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sedona_fx.search.relaxed.state import LocalLoss, RelaxedBlock, Slot, State, Tensors, named_tensors
from sedona_fx.search.relaxed.vjp import Leaf, add, gradients, live, named, own_nodes, reached

LOSS: Leaf = ("", 0)  # the end of the last block; no value has this name


@dataclass(frozen=True)
class Stretch:
    """A block as the way down needs it: where its part of the graph ends and where it starts."""

    made: dict[Leaf, Tensor]  # its live exports; of the last block, the loss
    ends: dict[Leaf, Tensor]  # of these, what the heads read
    read: dict[Leaf, Tensor]  # live exports of earlier blocks, by nodes of its own
    weights: dict[Slot, Tensor]  # those that `made` depends on (not the heads'), by nodes of its own
    heads: dict[Slot, Tensor]  # those that only the heads depend on, likewise

    def descend(self, above: dict[Leaf, Tensor], create_graph: bool) -> dict[Slot, Tensor]:
        """Take the cotangents of what this block made out of `above`, put in those of what it read.

        Returns the gradients of the block's weights.
        """
        roots = {leaf: t for leaf, t in self.made.items() if leaf in above}
        cotangents = [above.pop(leaf) for leaf in roots]
        found = gradients([*roots.values()], [*self.weights.values(), *self.read.values()], cotangents, create_graph)
        add(above, named(self.read, found[len(self.weights) :]))
        return named(self.weights, found)


@dataclass
class Ascent:
    """What a relaxed step met at a cut: the random states before its block ran, dl_i/dh_i, and U_v = dLt_(i+1)/dv of
    every value v that crosses."""

    devices: list[torch.device]
    states: list[Tensor]
    local: dict[Leaf, Tensor] = field(default_factory=dict)
    above: dict[Leaf, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, device: torch.device) -> Ascent:
        """Note the random states of the CPU and of a device."""
        devices = [] if device.type in ("cpu", "meta") else [device]
        return cls(devices, [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)])

    def replay_draws(self) -> None:
        """Put the global streams into the states from before the block ran."""
        torch.set_rng_state(self.states[0])
        for device, state in zip(self.devices, self.states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


def ascend(
    blocks: Sequence[RelaxedBlock],
    i: int,
    state: State,
    held: Sequence[Tensors],
    env: Mapping[str, Any],
    inputs: Mapping[str, Any],
    target: Any,
    mixture: Tensor | None,
    local_loss: LocalLoss,
    heads: bool = True,
) -> tuple[Stretch, dict[str, Any], Tensor]:
    """Run block i at the weights `held` and take its local loss; return its stretch, its exports, and the loss.

    Without `heads`, a block but the last runs them only if it must, and has no loss: a constant 0 stands for it.

    Raises:
        ValueError: a head uses a weight of the base layer in front of it. Its two gradients have different rates, and
            one walk cannot tell them apart.
    """
    block, last = blocks[i], len(blocks) - 1
    given = {n: own_nodes(env[n]) for n in block.inputs if n in env}
    slots = state.slots(state.params, i)
    weights: dict[Slot, Tensor] = {(k, n): own_nodes(held[k][n]) for k, n in dict.fromkeys(slots.values())}
    tensors = {n: weights[slot] for n, slot in slots.items()} | state.used(state.buffers, i)
    headless = not heads and i < last
    module = block.trunk if headless and block.trunk is not None else block.module
    exports, output = run_block(block, module, tensors, mixture, {**inputs, **given})
    loss = torch.zeros(()) if headless else local_loss(i, output, target)
    read = live(given)
    if i == last:
        return Stretch({LOSS: loss}, {}, read, weights, {}), exports, loss
    made, ends = live(exports), live({str(block.boundary): exports[str(block.boundary)]})
    base = reached(made.values(), weights, stop=read.values())
    if headless:
        return Stretch(made, ends, read, {slot: t for slot, t in weights.items() if slot in base}, {}), exports, loss
    headed = reached([loss], weights, stop=ends.values())
    if both := base & headed:
        names = ", ".join(n for n, slot in slots.items() if slot in both)
        raise ValueError(f"block {i}: its heads depend on {names} other than through the boundary {block.boundary!r}")
    head_weights = {slot: t for slot, t in weights.items() if slot not in base}
    base_weights = {slot: t for slot, t in weights.items() if slot in base}
    return Stretch(made, ends, read, base_weights, head_weights), exports, loss


def run_block(
    block: RelaxedBlock, module: nn.Module, tensors: Tensors, beta: Tensor | None, env: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Run one block on the values of `env`; return its exports by name and its local output.

    `tensors` are its parameters and buffers; those that `module`, the block's or its eval module, lacks are left out.
    """
    if beta is not None and block.beta is not None:
        tensors = {**tensors, block.beta: beta}
    own = named_tensors(module)
    given = {n: t for n, t in tensors.items() if n in own}
    values, local = functional_call(module, given, tuple(env[n] for n in block.inputs))
    return dict(zip(block.exports, values, strict=True)), local
