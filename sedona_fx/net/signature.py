"""The arguments of a net: bound by name, and checked against the ones that its graphs were made for.

A graph is right for the arguments it was traced with. An argument without tensors (a flag, a scale) is part of the
graph, and ``torch.export`` fixes all sizes except that of the batch: a call with others would compute something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args, same_plain
from sedona_fx.errors import DataError, PlanError, shape_text
from sedona_fx.plan import Capture


class Signature:
    """Binds the arguments of a call by name, and refuses those that the graphs of a net cannot take.

    Args:
        forward: the model's own method, which names the arguments.
        inputs: the description of the batch that the graphs were made with, as in a plan.
        placeholders: names of the arguments that the graphs read; all others are part of the graphs.
        capture: how the graphs were made.

    Attributes:
        fixed: names of the arguments that are part of the graphs.
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
            args: the arguments of the call.
            device: the device that tensors have to be on; None: any.

        Raises:
            DataError: the net was traced with other arguments, or with other sizes, values or devices.
        """
        values = args.bind(self.forward)
        for name in values.keys() - self.inputs.keys():
            raise DataError(
                f"the net was traced without the argument {name!r}; give it in the first batch handed to decouple."
            )
        for name in self.inputs.keys() - values.keys():
            if not (self.capture.hosted and self._has_default(name)):
                raise DataError(
                    f"the argument {name!r} is missing; the net was traced with {sorted(self.inputs)}. Give it in "
                    "every batch, or leave it out of the first batch handed to decouple."
                )
            values[name] = None  # the host's own code handles its absence, such as a detector's targets in evaluation
        for name in self.fixed:
            if not same_plain(values[name], self.inputs[name]):
                raise DataError(
                    f"the argument {name!r} is {values[name]!r}, the net was traced with {self.inputs[name]!r}: "
                    "arguments without tensors are part of the graph. Hand what changes from batch to batch as a "
                    "tensor."
                )
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._check_tensor(name, value, device)
        return values

    def _has_default(self, name: str) -> bool:
        return inspect.signature(self.forward).parameters[name].default is not inspect.Parameter.empty

    def _check_tensor(self, name: str, tensor: Tensor, device: torch.device | None) -> None:
        if device is not None and tensor.device != device:
            raise DataError(
                f"the input {name!r} is on {tensor.device}, the model is on {device}: move the one with "
                f"{name}.to({str(device)!r}), or the other with net.to(...)."
            )
        if self.capture.fixed_sizes:
            free, traced = int(self.capture.free_batch), list(self.inputs[name]["shape"])
            if list(tensor.shape)[free:] != traced[free:]:
                sizes = ", ".join(map(str, ["any"] * free + traced[free:]))
                raise DataError(
                    f"the input {name!r} has the shape {shape_text(tensor.shape)}, but the model was traced with "
                    f"({sizes}): of a model captured by torch.export only the size of the batch is free. Pad or crop "
                    "the input, or decouple the model anew for this size."
                )


def described(example: Args) -> dict[str, Any]:
    """Return the description of a batch that a plan keeps: by argument name, shape and dtype in place of every tensor.

    Args:
        example: the batch, every input under its argument name.
    """

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return value

    return {name: pytree.tree_map(spec, value) for name, value in example.kwargs.items()}


def example_like(inputs: Mapping[str, Any], device: torch.device) -> Args:
    """Return a batch that fits a plan's description of the inputs: zeros for integers, seeded noise for floats.

    Raises:
        PlanError: PyTorch cannot make a tensor of that dtype and shape.
    """
    generator = torch.Generator().manual_seed(0)

    def make(spec: Any) -> Any:
        if not is_spec(spec):
            return spec  # a plain value
        dtype = getattr(torch, spec["dtype"])
        try:
            if dtype.is_floating_point:
                return torch.randn(spec["shape"], generator=generator).to(dtype).to(device)
            return torch.zeros(spec["shape"], dtype=dtype, device=device)
        except (RuntimeError, NotImplementedError, TypeError, MemoryError) as error:
            raise PlanError(
                f"an input of the plan, {spec['dtype']} of shape {spec['shape']}, cannot be made here "
                f"({str(error).splitlines()[0].rstrip('.')}). Hand a batch as data=."
            ) from None

    def is_spec(value: Any) -> bool:
        return isinstance(value, Mapping) and set(value) == {"shape", "dtype"}

    return Args(**{name: pytree.tree_map(make, value, is_leaf=is_spec) for name, value in inputs.items()})
