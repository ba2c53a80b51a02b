"""``root=``: only a sub-module becomes a graph; the code around it, its host, runs as plain Python in two calls.

This serves models whose own forward cannot be traced, but whose backbone can. The first call,
:class:`~sedona_fx.capture.host_calls.Enter`, runs the host's forward until it reaches the sub-module, and returns the
sub-module's arguments. Then the sub-module's graph runs. The second call,
:class:`~sedona_fx.capture.host_calls.Leave`, runs the host's forward again, with a stub that returns the sub-module's
output, to the end. So the host's code before the sub-module runs twice; random numbers and buffers are as if it ran
once. Both calls take the host's parameters as arguments, so that the blocks in which they run own these parameters
under the user's names.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.capture.graph_module import with_record
from sedona_fx.capture.host_calls import Enter, HostCall, Leave, outside, recorded, replaced_forward
from sedona_fx.capture.keep import keep_state
from sedona_fx.capture.proof import autograd_nodes
from sedona_fx.capture.regions import watch_regions
from sedona_fx.data.args import Args
from sedona_fx.errors import CutError
from sedona_fx.ir.graph import info, output_node
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.ir.program import Program, attribute
from sedona_fx.ir.region import Region, new_graph
from sedona_fx.rng import seed_all


@dataclass(frozen=True)
class Seen:
    """One run of the host in one mode: the sub-module's arguments by name, and what the host returned.

    Attributes:
        region: the autocast or no-grad region in which the host calls the sub-module.
    """

    given: dict[str, Any]
    output: Any
    region: Region | None


def watch_root(model: nn.Module, example: Args, root: str, *, training: bool) -> Seen:
    """Run the model as it is, and observe what the sub-module is called with.

    Args:
        model: its state and its modes are the same afterwards.
        example: one batch.
        root: module path of the sub-module.
        training: the mode to run in.

    Raises:
        CutError: the sub-module is called never or several times.
    """
    submodule, calls, regions = model.get_submodule(root), list[dict[str, Any]](), list[Region | None]()
    original = submodule.forward

    def observe(*args: Any, **kwargs: Any) -> Any:
        calls.append(Args(*args, **kwargs).bind(original))
        regions.append(watch.current())
        return original(*args, **kwargs)

    with keep_state(model), keep_modes(model), torch.enable_grad(), replaced_forward(submodule, observe):
        model.train(training)
        seed_all(0)
        with watch_regions(strict=False) as watch:
            output = model(**map_tensors(torch.clone, example.bind(model.forward)))
    if len(calls) != 1:
        raise CutError(
            f"root={root!r} is called {len(calls)} times in a forward of {type(model).__name__}, and the code around "
            "it cannot be traced: name a sub-module that is called once, on the way from the inputs to the output."
        )
    return Seen(calls[0], output, regions[0])


@dataclass(frozen=True)
class Reads:
    """Names of the host's parameters and buffers that its code reads before and after the sub-module."""

    before: tuple[str, ...]
    after: tuple[str, ...]


def reads_of(model: nn.Module, root: str, seen: Seen) -> Reads:
    """Return which of its own tensors the host reads before and after the sub-module.

    Read before are the parameters that the sub-module's arguments depend on. All parameters and buffers count as read
    after: for a parameter read before, the graph of the output cannot tell whether the output depends on it past the
    sub-module as well, or only through the sub-module.
    """
    names = {parameter: name for name, parameter in outside(model.named_parameters(), root)}
    entering = {node.variable for node in autograd_nodes(seen.given) if hasattr(node, "variable")}
    before = tuple(name for parameter, name in names.items() if parameter in entering)
    buffers = tuple(name for name, _ in outside(model.named_buffers(), root))
    return Reads(before, (*names.values(), *buffers))


def graph_around(
    model: nn.Module,
    root: str,
    sub: fx.GraphModule,
    arguments: Mapping[str, Any],
    seen: Seen,
    reads: Reads,
    *,
    training: bool,
) -> fx.GraphModule:
    """Return a graph of the whole model: :class:`Enter`, then the sub-module's graph, then :class:`Leave`.

    Args:
        model: the host.
        root: module path of the sub-module in it.
        sub: TRACED graph of the sub-module; it is not changed. Its nodes get paths and targets below `root`.
        arguments: name -> value, as the host's forward takes them.
        seen: the run of the host in the mode of the graph.
        reads: the tensors that the two calls take as arguments.
        training: the mode of the graph.
    """
    graph, attributes = new_graph(), dict[str, Any]()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names_in_model = {*dict(model.named_modules(remove_duplicate=False)), *tensors}

    def read(names: Sequence[str]) -> tuple[fx.Node, ...]:
        attributes.update({name: tensors[name] for name in names})
        return tuple(with_record(graph.get_attr(name)) for name in names)

    enter = Enter("enter", model, root, arguments, training=training)
    leave = Leave("leave", model, root, arguments, training=training)
    inputs = tuple(with_record(graph.placeholder(name)) for name in enter.names)
    enter.wanted = [str(node.target) for node in sub.graph.nodes if node.op == "placeholder"]
    enter.recorded = (None, *(recorded(seen.given[name]) for name in enter.wanted))
    leave.recorded = recorded(seen.output)
    entered = with_record(graph.call_function(enter, (inputs, read(reads.before))))
    visit = with_record(graph.call_function(operator.getitem, (entered, 0)))
    env: dict[fx.Node, fx.Node] = {}  # node of the sub-module's graph -> node of the new graph
    for node in sub.graph.nodes:
        record = info(node)
        path = f"{root}.{record.path}" if record.path else root
        returned_by = tuple(f"{root}.{name}" for name in record.returned_by)
        if node.op == "placeholder":
            env[node] = with_record(graph.call_function(operator.getitem, (entered, len(env) + 1)), root)
        elif node.op != "output":
            region = record.region.inside(seen.region) if record.region is not None else seen.region
            env[node] = with_record(graph.node_copy(node, env.__getitem__), path, returned_by, region=region)
            if node.op in ("call_module", "get_attr"):
                target = str(node.target)
                full_name = f"{root}.{target}"
                # What the model has no name for is a constant that the forward made.
                env[node].target = full_name if full_name in names_in_model else target
                attributes[str(env[node].target)] = attribute(sub, target)
    output = fx.map_arg(output_node(sub.graph).args[0], env.__getitem__)
    if isinstance(output, fx.Node):
        info(output).returned_by = (*info(output).returned_by, root)
    left = with_record(graph.call_function(leave, (visit, inputs, read(reads.after), output)))
    with_record(graph.output(left))
    gm = Program(attributes, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(f"{root}.{path}" for path in sub.meta.get("base_layers", ()))
    return gm


def rehost(graphs: Iterable[fx.GraphModule], host: nn.Module) -> None:
    """Make the host calls in copied graphs run `host`, the copy of the model: fx does not copy call targets."""
    copies: dict[HostCall, HostCall] = {}
    for gm in {id(gm): gm for gm in graphs}.values():
        nodes = [node for node in gm.graph.nodes if isinstance(node.target, HostCall)]
        for node in nodes:
            original: HostCall = node.target
            if original not in copies:
                copies[original] = copy.copy(original)
                copies[original].host = host
            node.target = copies[original]
        if nodes:
            gm.recompile()
