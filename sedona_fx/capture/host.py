"""``root=``: only a sub-module becomes a graph; the host around it runs as it is, as Python, in two calls.

:class:`Enter` runs the host's forward until it reaches the sub-module and gives out what enters there; :class:`Leave`
runs it again with a stub that puts the sub-module's output back in, and goes on to the end. In between stands the
sub-module's graph. What the host does before the sub-module is done twice; random numbers and buffers are as if it were
done once. Both calls read the host's parameters as arguments, so that the blocks they fall into own them under the
user's names.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.proof import nodes_behind
from sedona_fx.capture.state_watch import keep_state
from sedona_fx.capture.tracer import holds_tensor
from sedona_fx.data.args import Args
from sedona_fx.errors import CutError, TraceError
from sedona_fx.ir.graph import INFO, NodeInfo, TensorSpec, info, output_node
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.rng import random_states, restore_random, seed_all


@dataclass(frozen=True)
class Recorded:
    """A tensor that a call gave for the example batch."""

    spec: TensorSpec
    requires_grad: bool


@dataclass(frozen=True)
class Visit:
    """What the second call needs of the first: the states of the random generators before it."""

    random: list[Any]


class _Reached(BaseException):  # no Exception: the host may catch those
    def __init__(self, args: Args) -> None:
        self.args_of_root = args


class HostCall:
    """One of the two calls; a plain function to fx. ``recorded`` is what it gave for the example batch."""

    def __init__(self, name: str, host: nn.Module, root: str, given: Mapping[str, Any], *, training: bool) -> None:
        self.__name__ = self.__qualname__ = name  # what fx prints
        self.__module__ = __name__
        self.host, self.root, self.training = host, root, training
        self.names = [argument for argument, value in given.items() if holds_tensor(value)]
        self.fixed = {argument: value for argument, value in given.items() if argument not in self.names}
        self.recorded: Any = None

    def run(self, inputs: Sequence[Any], stub: Callable[..., Any]) -> Any:
        """Run the host in the mode of its graph, `stub` in the place of the sub-module's forward."""
        arguments = {name: value for name, value in zip(self.names, inputs, strict=True) if value is not None}
        with _mode(self.host, self.training), replaced_forward(self.host.get_submodule(self.root), stub):
            return self.host(**arguments, **self.fixed)


class Enter(HostCall):
    """Runs the host up to the sub-module: ``(visit, argument, ...)``, by the names in `wanted`."""

    wanted: Sequence[str] = ()

    def __call__(self, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the visit and the arguments; `tensors` are the host's own and stand there for who owns them."""
        visit = Visit(random_states())

        def reach(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(Args(*args, **kwargs))

        try:
            self.run(inputs, reach)
        except _Reached as reached:
            given = reached.args_of_root.bind(self.host.get_submodule(self.root).forward)
            return (visit, *(given[name] for name in self.wanted))
        raise TraceError(f"the model did not call {self.root!r} this time: root= names a module that is always called.")


class Leave(HostCall):
    """Runs the host from the start, its way to the sub-module retraced, and on to the end: the model's own output."""

    def __call__(self, visit: Visit, inputs: Sequence[Any], tensors: Sequence[Tensor], output: Any) -> Any:
        """Return the model's own output, for what the sub-module gave."""
        now = random_states()
        kept = [(buffer, buffer.detach().clone()) for name, buffer in outside(self.host.named_buffers(), self.root)]
        calls = 0

        def put_back(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            for buffer, value in kept:
                buffer.data.copy_(value)  # past autograd, as batch norm's own updates go
            restore_random(now)
            return output

        restore_random(visit.random)
        result = self.run(inputs, put_back)
        if calls != 1:
            raise TraceError(f"the model called {self.root!r} {calls} times: root= names a module called once.")
        return result


def rehost(graphs: Iterable[fx.GraphModule], host: nn.Module) -> None:
    """Let the calls in copied graphs run another host, the copy: fx copies no call targets."""
    made: dict[HostCall, HostCall] = {}
    for gm in {id(gm): gm for gm in graphs}.values():
        calls = [node for node in gm.graph.nodes if isinstance(node.target, HostCall)]
        for node in calls:
            old: HostCall = node.target
            if old not in made:
                made[old] = copy.copy(old)
                made[old].host = host
            node.target = made[old]
        if calls:
            gm.recompile()


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
    """Let a module run something else in the place of its forward."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def outside(named: Iterable[tuple[str, Any]], root: str) -> list[tuple[str, Any]]:
    """Return the named tensors that do not belong to the sub-module."""
    return [(name, value) for name, value in named if not name.startswith(f"{root}.")]


@dataclass(frozen=True)
class Seen:
    """One run of the host in one mode: what entered the sub-module, and what the host returned."""

    given: dict[str, Any]
    output: Any


def watch_root(model: nn.Module, example: Args, root: str, *, training: bool) -> Seen:
    """Run the model as it is and see what enters the sub-module.

    Raises:
        CutError: it is not called, or several times.
    """
    sub, calls = model.get_submodule(root), list[dict[str, Any]]()
    original = sub.forward

    def look(*args: Any, **kwargs: Any) -> Any:
        calls.append(Args(*args, **kwargs).bind(original))
        return original(*args, **kwargs)

    with keep_state(model), keep_modes(model), torch.enable_grad(), replaced_forward(sub, look):
        model.train(training)
        seed_all(0)
        output = model(**map_tensors(torch.clone, example.bind(model.forward)))
    if len(calls) != 1:
        raise CutError(
            f"root={root!r} is called {len(calls)} times in a forward of {type(model).__name__}, and the code around "
            "it cannot be traced: name a sub-module that is called once, on the way from the inputs to the output."
        )
    return Seen(calls[0], output)


def graph_around(
    model: nn.Module,
    root: str,
    sub: fx.GraphModule,
    given: Mapping[str, Any],
    seen: Seen,
    reads: Reads,
    *,
    training: bool,
) -> fx.GraphModule:
    """Put the sub-module's graph between the two calls of its host."""
    graph, attributes = fx.Graph(), dict[str, Any]()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names_of = {*dict(model.named_modules(remove_duplicate=False)), *tensors}

    def made(node: fx.Node, path: str = "", returned_by: tuple[str, ...] = ()) -> fx.Node:
        node.meta[INFO] = NodeInfo(path=path, returned_by=returned_by)
        return node

    def read(names: Sequence[str]) -> tuple[fx.Node, ...]:
        attributes.update({name: tensors[name] for name in names})
        return tuple(made(graph.get_attr(name)) for name in names)

    enter = Enter("enter", model, root, given, training=training)
    leave = Leave("leave", model, root, given, training=training)
    inputs = tuple(made(graph.placeholder(name)) for name in enter.names)
    enter.wanted = [str(node.target) for node in sub.graph.nodes if node.op == "placeholder"]
    enter.recorded = (None, *(_record(seen.given[name]) for name in enter.wanted))
    leave.recorded = _record(seen.output)
    entered = made(graph.call_function(enter, (inputs, read(reads.before))))
    visit = made(graph.call_function(operator.getitem, (entered, 0)))
    env: dict[fx.Node, fx.Node] = {}
    for node in sub.graph.nodes:
        record = info(node)
        path = f"{root}.{record.path}" if record.path else root
        names = tuple(f"{root}.{name}" for name in record.returned_by)
        if node.op == "placeholder":
            env[node] = made(graph.call_function(operator.getitem, (entered, len(env) + 1)), root)
        elif node.op != "output":
            env[node] = made(graph.node_copy(node, env.__getitem__), path, names)
            if node.op in ("call_module", "get_attr"):
                target = str(node.target)
                inside = f"{root}.{target}"
                env[node].target = inside if inside in names_of else target  # else a constant that the forward made
                attributes[str(env[node].target)] = fx.graph_module._get_attr(sub, target)
    output = fx.map_arg(output_node(sub.graph).args[0], env.__getitem__)
    if isinstance(output, fx.Node):
        info(output).returned_by = (*info(output).returned_by, root)
    made(graph.output(made(graph.call_function(leave, (visit, inputs, read(reads.behind), output)))))
    gm = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(f"{root}.{path}" for path in sub.meta.get("base_layers", ()))
    return gm


@dataclass(frozen=True)
class Reads:
    """Names of the host's parameters (and buffers) that it reads before and behind the sub-module."""

    before: tuple[str, ...]
    behind: tuple[str, ...]


def reads_of(model: nn.Module, root: str, seen: Seen) -> Reads:
    """Return which parameters of the host what enters the sub-module depends on; the host may need all others behind.

    One that what enters depends on is also read behind only if the output depends on it past the sub-module, which the
    output's own graph cannot tell from the way through: it counts as read behind, too.
    """
    names = {parameter: name for name, parameter in outside(model.named_parameters(), root)}
    entering = {node.variable for node in nodes_behind(seen.given) if hasattr(node, "variable")}
    before = tuple(name for parameter, name in names.items() if parameter in entering)
    buffers = tuple(name for name, _ in outside(model.named_buffers(), root))
    return Reads(before, (*names.values(), *buffers))


def _record(value: Any) -> Any:
    return map_tensors(lambda t: Recorded(TensorSpec(tuple(t.shape), t.dtype, t.device), t.requires_grad), value)


def as_recorded(call: HostCall) -> Any:
    """Return what a call into an untraced host gave for the example batch, as tensors without these numbers."""

    def make(value: Any) -> Any:
        if not isinstance(value, Recorded):
            return value
        spec = value.spec
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device).requires_grad_(value.requires_grad)

    return pytree.tree_map(make, call.recorded)
