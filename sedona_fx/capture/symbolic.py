"""The first front end: symbolic tracing. It keeps modules and modes, and is thirty times faster than the second.

Symbolic tracing alone can be silently wrong: a random branch is frozen, a counter is increased once and never again, a
buffer update vanishes. So if random numbers were drawn meanwhile, the module that draws is kept whole or the recording
refused; if state changed, it is refused, unless only attributes did that carry nothing from call to call
(:mod:`sedona_fx.capture.attributes`). Errors name the line of the user's code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from sedona_fx.capture.attributes import UNWRITTEN, scratch_attributes
from sedona_fx.capture.blame import locate_side_effect
from sedona_fx.capture.checkpoints import plain_checkpoints
from sedona_fx.capture.graph_module import build_graph_module
from sedona_fx.capture.hooks import Registrations, refusal, watch_hooks
from sedona_fx.capture.state_watch import DRAWS, StateWatch
from sedona_fx.capture.tracer import Tracer
from sedona_fx.capture.whole.derivatives import make_derivatives_local
from sedona_fx.capture.whole.reasons import Undecided
from sedona_fx.errors import TraceError, did_you_mean
from sedona_fx.ir.graph import copy_graph


def find_leaves(model: nn.Module, paths: Collection[str]) -> frozenset[nn.Module]:
    """Return the modules that the user wants to keep whole.

    Args:
        model: the model that is to be traced.
        paths: their module paths in it.

    Raises:
        TraceError: the model has no module of such a path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if not isinstance(path, str) or path not in modules or not path:
            raise TraceError(
                f"leaf_modules names {path!r}, which the model does not have{did_you_mean(str(path), modules)}."
            )
    return frozenset(modules[path] for path in paths)


def record_symbolically(
    model: nn.Module, arguments: Mapping[str, Any], leaves: frozenset[nn.Module]
) -> tuple[fx.GraphModule, list[nn.Module]]:
    """Record the model's forward in its present mode by symbolic tracing.

    Args:
        model: its state is the same afterwards.
        arguments: name -> value. Values without a tensor become part of the graph.
        leaves: modules that become one node each, besides PyTorch's own layers.

    Returns:
        The graph, and the modules that read their own ``training`` flag.

    Raises:
        TraceError: the forward cannot be traced, or it changed state or drew random numbers meanwhile.
    """
    tracer = Tracer(leaves, arguments)
    watch, registrations = StateWatch(model), Registrations()
    try:
        with watch_hooks(registrations), plain_checkpoints():
            graph = tracer.trace(model)
        hook = registrations.first()
        change, attributes_alone = watch.changed(), watch.only_attributes()
        graph, _ = copy_graph(graph)  # without the tracer's class, which would be asked to unpickle the graph
        make_derivatives_local(graph)
        gm = build_graph_module(model, graph, model)
    except Exception as error:
        raise tracer.explain(error) from error
    finally:
        registrations.remove()
        watch.restore()
    if hook:
        raise TraceError(f"cannot record the forward of {type(model).__name__}: {refusal(hook)}")
    unwritten = scratch_attributes(model, arguments) if change and attributes_alone else None
    if change and unwritten is None:
        line, path = locate_side_effect(model, lambda: Tracer(leaves, arguments).trace(model))
        text = (
            f"tracing {type(model).__name__} in {'train' if model.training else 'eval'} mode {change}: this would "
            f"happen once, now, and never again in training{line}."
        )
        raise Undecided(text, path) if change == DRAWS else TraceError(text)
    gm.meta[UNWRITTEN] = unwritten or ()
    return gm, list(tracer.mode_reads)
