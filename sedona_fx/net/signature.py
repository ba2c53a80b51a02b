"""What a net may be called with: the arguments, sizes and devices that its graphs were made for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args, same_plain
from sedona_fx.errors import DataError, shape_text
from sedona_fx.plan import Capture


class Signature:
    """Binds the arguments of a call by name and refuses what the graphs of a net cannot take.

    Args:
        forward: the model's own; says what the arguments are called.
        inputs: a plan's description of the batch that the graphs were made with.
        placeholders: the arguments that the graphs read; all others are part of the graphs.
        capture: how the graphs were made.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        inputs: Mapping[str, Any],
        placeholders: Collection[str],
        capture: Capture,
    ) -> None:
        self.forward, self.inputs, self.capture = forward, inputs, capture
        self.fixed = [name for name in inputs if name not in placeholders]

    def bind(self, args: Args, device: torch.device | None) -> dict[str, Any]:
        """Return argument name -> value.

        Args:
            args: of the call.
            device: where tensors have to be; None: anywhere.

        Raises:
            DataError: arguments that the net was not traced with, or other sizes, values or devices.
        """
        given, wanted = args.bind(self.forward), self.inputs
        for name in given.keys() - wanted.keys():
            raise DataError(
                f"the net was traced without the argument {name!r}; give it in the first batch handed to decouple."
            )
        for name in wanted.keys() - given.keys():
            if (
                not self.capture.hosted
                or inspect.signature(self.forward).parameters[name].default is inspect.Parameter.empty
            ):
                raise DataError(f"the argument {name!r} is missing; the net was traced with {sorted(wanted)}.")
            given[name] = None  # the host's own code does without, as with a detector's targets in evaluation
        for name in self.fixed:
            if not same_plain(given[name], wanted[name]):
                raise DataError(
                    f"the argument {name!r} is {given[name]!r}, the net was traced with {wanted[name]!r}: arguments "
                    "without tensors are part of the graph. Hand what changes from batch to batch as a tensor."
                )
        for name, value in given.items():
            if isinstance(value, Tensor):
                self._check(name, value, device)
        return given

    def _check(self, name: str, tensor: Tensor, device: torch.device | None) -> None:
        if device is not None and tensor.device != device:
            raise DataError(
                f"the input {name!r} is on {tensor.device}, the model is on {device}: move the one with "
                f"{name}.to({str(device)!r}), or the other with net.to(...)."
            )
        if self.capture.fixed_sizes:
            free, traced = int(self.capture.free_batch), list(self.inputs[name]["shape"])
            if list(tensor.shape)[free:] != traced[free:]:
                wanted = ", ".join(map(str, ["any"] * free + traced[free:]))
                raise DataError(
                    f"the input {name!r} has the shape {shape_text(tensor.shape)}, but the model was traced with "
                    f"({wanted}): of a model captured by torch.export only the size of the batch is free. Pad or crop "
                    "the input, or decouple the model anew for this size."
                )


def described(example: Args) -> dict[str, Any]:
    """Return a plan's description of the inputs: by argument name, shape and dtype in place of every tensor."""

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return value

    return {name: pytree.tree_map(spec, value) for name, value in example.kwargs.items()}


def example_like(inputs: Mapping[str, Any], device: torch.device) -> Args:
    """Make an example batch from a plan's description of the inputs: zeros for integers, seeded noise for floats."""
    generator = torch.Generator().manual_seed(0)

    def make(spec: Any) -> Any:
        if not is_spec(spec):
            return spec  # an argument without tensors
        dtype = getattr(torch, spec["dtype"])
        if dtype.is_floating_point:
            return torch.randn(spec["shape"], generator=generator).to(dtype).to(device)
        return torch.zeros(spec["shape"], dtype=dtype, device=device)

    def is_spec(value: Any) -> bool:
        return isinstance(value, Mapping) and set(value) == {"shape", "dtype"}

    return Args(**{name: pytree.tree_map(make, value, is_leaf=is_spec) for name, value in inputs.items()})
