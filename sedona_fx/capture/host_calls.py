"""The two calls that run the code around a sub-module as plain Python: up to the sub-module, and from it to the end.

To fx they are functions without source code, each one node of a graph. Why there are two, and what runs between them,
is told in :mod:`sedona_fx.capture.host`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.graph_module import spec_of
from sedona_fx.capture.regions import keep_process_state
from sedona_fx.capture.tracer import holds_tensor
from sedona_fx.capture.whole.late_buffers import overwrite
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import TensorSpec
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.rng import random_states, restore_random


@dataclass(frozen=True)
class Recorded:
    """Stands for a tensor that a call returned for the example batch."""

    spec: TensorSpec
    requires_grad: bool


@dataclass(frozen=True)
class Visit:
    """What :class:`Leave` needs from :class:`Enter`: the states of the global random generators before the call."""

    random: list[Any]


class _Reached(BaseException):  # not an Exception: the host may catch those
    def __init__(self, args: Args) -> None:
        self.args_of_root = args


class HostCall:
    """One of the two calls of the host; to fx it is a plain function.

    Args:
        name: function name that fx prints.
        host: the whole model.
        root: module path of the sub-module in it.
        arguments: name -> value, as the host's forward takes them. Those without a tensor are fixed to their values.
        training: the mode of the graph that makes the call.

    Attributes:
        recorded: what the call returned for the example batch, tensors replaced by :class:`Recorded`.
    """

    def __init__(self, name: str, host: nn.Module, root: str, arguments: Mapping[str, Any], *, training: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__
        self.host, self.root, self.training = host, root, training
        self.names = [argument for argument, value in arguments.items() if holds_tensor(value)]
        self.fixed = {argument: value for argument, value in arguments.items() if argument not in self.names}
        self.recorded: Any = None

    def run(self, inputs: Sequence[Any], stub: Callable[..., Any]) -> Any:
        """Run the host in the mode of its graph, with `stub` in place of the sub-module's forward.

        What the host has switched in the process when the stub ends it is switched back.
        """
        arguments = {name: value for name, value in zip(self.names, inputs, strict=True) if value is not None}
        stubbed = replaced_forward(self.host.get_submodule(self.root), stub)
        with _mode(self.host, self.training), keep_process_state(), stubbed:
            return self.host(**arguments, **self.fixed)


class Enter(HostCall):
    """Runs the host until it calls the sub-module; returns ``(visit, argument, ...)``, arguments as in `wanted`."""

    wanted: Sequence[str] = ()

    def __call__(self, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the visit and the sub-module's arguments.

        Args:
            inputs: values of the host's arguments, in the order of `names`.
            tensors: the host's own tensors that the arguments depend on. They are not used here, but make the block in
                which this call runs their owner.

        Raises:
            TraceError: the host did not call the sub-module.
        """
        visit = Visit(random_states())

        def reach(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(Args(*args, **kwargs))

        try:
            self.run(inputs, reach)
        except _Reached as reached:
            arguments = reached.args_of_root.bind(self.host.get_submodule(self.root).forward)
            return (visit, *(arguments[name] for name in self.wanted))
        raise TraceError(f"the model did not call {self.root!r} this time: root= names a module that is always called.")


class Leave(HostCall):
    """Runs the host from start to end, the sub-module's output given; returns the model's own output."""

    def __call__(self, visit: Visit, inputs: Sequence[Any], tensors: Sequence[Tensor], output: Any) -> Any:
        """Return the model's own output.

        Args:
            visit: from the call of :class:`Enter`. The code before the sub-module draws the same random numbers again.
            inputs: values of the host's arguments, in the order of `names`.
            tensors: the host's own tensors. They are not used here, but make the block in which this call runs their
                owner.
            output: what the sub-module returned.

        Raises:
            TraceError: the host did not call the sub-module exactly once.
        """
        random_before = random_states()
        host_buffers = outside(self.host.named_buffers(), self.root)
        buffers_before = [(buffer, buffer.detach().clone()) for _, buffer in host_buffers]
        calls = 0

        def return_output(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            for buffer, value in buffers_before:  # undo the second run of the code before the sub-module
                if buffer.shape == value.shape:
                    buffer.data.copy_(value)  # not recorded by autograd, like batch norm's own updates
                else:
                    overwrite(buffer, value)
            restore_random(random_before)
            return output

        restore_random(visit.random)
        result = self.run(inputs, return_output)
        if calls != 1:
            raise TraceError(f"the model called {self.root!r} {calls} times: root= names a module called once.")
        return result


def recorded(value: Any) -> Any:
    """Return a copy of a nested value with every tensor replaced by its :class:`Recorded`."""
    return map_tensors(lambda t: Recorded(spec_of(t), t.requires_grad), value)


def as_recorded(call: HostCall) -> Any:
    """Return what a call returned for the example batch, with new uninitialised tensors in place of its tensors."""

    def make(value: Any) -> Any:
        if not isinstance(value, Recorded):
            return value
        spec = value.spec
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device).requires_grad_(value.requires_grad)

    return pytree.tree_map(make, call.recorded)


@contextmanager
def _mode(host: nn.Module, training: bool) -> Iterator[None]:
    if host.training == training:
        yield
        return
    with keep_modes(host):
        host.train(training)
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another function in place of its forward, for the time of the body."""
    own_forward = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own_forward is not None:
            module.forward = own_forward


def outside(named: Iterable[tuple[str, Any]], root: str) -> list[tuple[str, Any]]:
    """Return those of the (name, tensor) pairs that do not belong to the sub-module at `root`."""
    return [(name, value) for name, value in named if not name.startswith(f"{root}.")]
