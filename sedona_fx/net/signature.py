"""The arguments of a net: bound by name, and checked against the ones that its graphs were made for.

A graph is right for the arguments it was traced with. An argument without tensors (a flag, a scale) is part of the
graph, and in an exported graph all sizes are fixed but those that it leaves free: a call with others would compute
something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.capture.tracer import holds_tensor
from sedona_fx.data.args import Args, same_plain
from sedona_fx.errors import DataError, PlanError, shape_text
from sedona_fx.net.trial import Trial
from sedona_fx.plan_values import FreeSize


class Untouched:
    """Stands for an argument's value, to see whether the model does anything with it: nothing can be done with it."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("this value stands for no value")

    __bool__ = __eq__ = __len__ = __iter__ = __int__ = __float__ = __index__ = __str__ = __repr__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Signature:
    """Binds the arguments of a call by name, and refuses those that the graphs of a net cannot take.

    An argument that the graphs do not have, or have with another value, is let pass if it makes no difference: if the
    model does not touch it, or is recorded as the same program with it. That is tried once for each such value.

    Args:
        trial: runs the model, whose own ``forward`` names the arguments.
        inputs: the description of the batch that the graphs were made with, as in a plan.
        placeholders: names of the arguments that the graphs read; all others are part of the graphs.

    Attributes:
        fixed: names of the arguments that are part of the graphs.
        capture: how the graphs were made.
    """

    def __init__(self, trial: Trial, inputs: Mapping[str, Any], placeholders: Collection[str]) -> None:
        self.trial, self.inputs, self.capture = trial, inputs, trial.capture
        self.fixed = [name for name in inputs if name not in placeholders]
        self._unread: dict[str, bool] = {}  # argument that the graphs lack -> whether the model leaves it alone
        self._tried: list[tuple[str, Any, bool]] = []  # argument, value, whether it makes no difference

    def bind(self, args: Args, device: torch.device | None) -> dict[str, Any]:
        """Return argument name -> value.

        Args:
            args: the arguments of the call.
            device: the device that tensors have to be on; None: any.

        Raises:
            DataError: the net was traced with other arguments, or with other sizes, values or devices.
        """
        values = args.bind(self.trial.model.forward)
        for name in [name for name in values if name not in self.inputs]:
            value = values.pop(name)
            if not self._makes_no_difference(name, value):
                raise DataError(self._unknown(name, value))
        for name in self.inputs.keys() - values.keys():
            default = self._default(name)
            if name in self.fixed and self._has_default(name) and self._makes_no_difference(name, default):
                values[name] = self.inputs[name]
            elif self.capture.hosted and self._has_default(name):
                values[name] = None  # the host's own code handles it, such as a detector's targets in evaluation
            else:
                other = f" (its default is {default!r})" if self._has_default(name) else ""
                raise DataError(
                    f"the argument {name!r} is missing{other}; the net was traced with {sorted(self.inputs)}. Give it "
                    "in every batch, or leave it out of the first batch handed to decouple."
                )
        for name in self.fixed:
            if not same_plain(values[name], self.inputs[name]) and not self._makes_no_difference(name, values[name]):
                raise DataError(
                    f"the argument {name!r} is {values[name]!r}, the net was traced with {self.inputs[name]!r}: "
                    "arguments without tensors are part of the graph. Hand what changes from batch to batch as a "
                    "tensor."
                )
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._check_device(name, value, device)
        if self.capture.fixed_sizes:
            self._check_sizes({name: value for name, value in values.items() if isinstance(value, Tensor)})
        return values

    def _unknown(self, name: str, value: Any) -> str:
        """Return the error for an argument that the first batch did not have."""
        default = self._default(name)
        held = f"the graph holds its default, {default!r}" if self._has_default(name) else "the graph does not have it"
        target = "; a target goes to the loss, net.backward(inputs, target)" if holds_tensor(value) else ""
        return (
            f"the net was traced without the argument {name!r}, which the model takes: {held}. Give it in the first "
            f"batch handed to decouple, and then in every batch; or leave it out of the call{target}."
        )

    def _makes_no_difference(self, name: str, value: Any) -> bool:
        """Whether the model computes what the graphs hold if this argument has this value."""
        if name not in self.inputs:
            if name not in self._unread:
                self._unread[name] = self.trial.same_output({name: Untouched()})
            if self._unread[name]:
                return True
        if holds_tensor(value):
            return False
        for tried, plain, same in self._tried:
            if tried == name and same_plain(plain, value):
                return same
        held = self.inputs.get(name, self._default(name))
        numbers = (bool, int, float, complex)
        if isinstance(value, numbers) and isinstance(held, numbers) and value == held:
            same = self.trial.same_output({name: value})  # the same number in another type
        else:
            same = self.trial.same_program(self.trial.recorded(), self.trial.recorded({name: value}))
        self._tried.append((name, value, same))
        return same

    def _default(self, name: str) -> Any:
        """Return the default of an argument; ``inspect.Parameter.empty`` if it has none."""
        parameter = inspect.signature(self.trial.model.forward).parameters.get(name)
        return parameter.default if parameter is not None else inspect.Parameter.empty

    def _has_default(self, name: str) -> bool:
        return self._default(name) is not inspect.Parameter.empty

    def _check_device(self, name: str, tensor: Tensor, device: torch.device | None) -> None:
        if device is not None and tensor.device != device:
            raise DataError(
                f"the input {name!r} is on {tensor.device}, the model is on {device}: move the one with "
                f"{name}.to({str(device)!r}), or the other with net.to(...)."
            )

    def _check_sizes(self, tensors: Mapping[str, Tensor]) -> None:
        """Check the sizes that an exported graph fixes, and that sizes which it takes for equal are equal."""
        free = {(size.name, size.dim): size for size in self.capture.free_sizes}
        known: dict[str, tuple[FreeSize, int]] = {}
        for name, tensor in tensors.items():
            shape, traced = tuple(tensor.shape), tuple(self.inputs[name]["shape"])
            allowed = [
                (size.least, size.most, size.text)
                if (size := free.get((name, dim))) is not None
                else (0, None, "any")
                if dim == 0 and self.capture.free_batch
                else (extent, extent, str(extent))
                for dim, extent in enumerate(traced)
            ]
            wrong = -1 if len(shape) != len(traced) else None
            for dim, ((least, most, _), extent) in enumerate(zip(allowed, shape, strict=False)):
                if wrong is None and not (least <= extent and (most is None or extent <= most)):
                    wrong = dim
            if wrong is not None:
                raise DataError(self._wrong_sizes(name, shape, [text for *_, text in allowed], wrong))
            for size in (free[name, dim] for dim in range(len(shape)) if (name, dim) in free):
                other, extent = known.setdefault(size.symbol, (size, shape[size.dim]))
                if extent != shape[size.dim]:
                    raise DataError(
                        f"dimension {size.dim} of the input {name!r} has {shape[size.dim]} entries, and dimension "
                        f"{other.dim} of {other.name!r} has {extent}: the model takes them for the same number."
                    )

    def _wrong_sizes(self, name: str, shape: tuple[int, ...], text: list[str], dim: int) -> str:
        """Return the error for an input of another shape; `text` has in words what each size may be."""
        where = f"its dimension {dim} has to be {text[dim]}" if dim >= 0 else f"it has to have {len(text)} dimensions"
        return (
            f"the input {name!r} has the shape {shape_text(shape)}, but the model was captured by torch.export with "
            f"({', '.join(text)}): {where}. Pad or crop the input, or decouple the model anew for this size. "
            f"decouple(..., dynamic={{{name!r}: [{max(dim, 0)}]}}) asks for a size to be free, and says what fixes it."
        )


def method_like(forward: Callable[..., Any], run: Callable[[Any, Args], Any]) -> Callable[..., Any]:
    """Return a function for use as a method, ``run(self, arguments)``, that has the signature of the model's forward.

    Trainers and exporters look at the signature to see which inputs a model takes.
    """

    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Return exactly what the model returns for these arguments, in the net's mode."""
        return run(self, Args(*args, **kwargs))

    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    signature = inspect.signature(forward)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=own + [p for p in signature.parameters.values() if p.name != "self"]
    )
    method.__name__ = "forward"
    return method


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
