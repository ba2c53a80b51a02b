"""The first front end: symbolic tracing. It keeps modules and modes, and is thirty times faster than the second.

It can be silently wrong: a random branch freezes, a counter runs once, a buffer update vanishes. So a recording in
which random numbers were drawn or state was changed is refused, with the line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from sedona_fx.capture.blame import locate_side_effect
from sedona_fx.capture.inplace import WRITES
from sedona_fx.capture.state_watch import StateWatch
from sedona_fx.capture.tracer import Tracer
from sedona_fx.errors import TraceError, did_you_mean
from sedona_fx.ir.graph import copy_graph, operation


def find_leaves(model: nn.Module, paths: Collection[str]) -> frozenset[nn.Module]:
    """Return the modules that the user keeps whole."""
    names = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if not isinstance(path, str) or path not in names or not path:
            raise TraceError(
                f"leaf_modules names {path!r}, which the model does not have{did_you_mean(str(path), names)}."
            )
    return frozenset(names[path] for path in paths)


def record_symbolically(
    model: nn.Module, given: Mapping[str, Any], leaves: frozenset[nn.Module]
) -> tuple[fx.GraphModule, list[nn.Module]]:
    """Return the graph of the model in its present mode, and the modules that looked at their mode."""
    tracer = Tracer(leaves, given)
    watch = StateWatch(model)
    try:
        graph = tracer.trace(model)
        changed = watch.changed()
        graph.eliminate_dead_code(is_impure)
        graph, _ = copy_graph(graph)  # without the tracer's class, which would be asked to unpickle the graph
        gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    except Exception as error:
        raise TraceError(f"cannot record the forward of {tracer.explain(error)}") from error
    finally:
        watch.restore()
    if changed:
        line = locate_side_effect(model, lambda: Tracer(leaves, given).trace(model))
        raise TraceError(
            f"tracing {type(model).__name__} in {'train' if model.training else 'eval'} mode {changed}: this would "
            f"happen once, now, and never again in training{line}."
        )
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    return gm, list(tracer.mode_reads)


_PURE = ("", "torch", "_operator", "operator", "builtins", "math", "collections")


def is_impure(node: fx.Node) -> bool:
    """Keep whatever may do something besides returning a value: modules with state, in-place writes, assertions."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = operation(node)
        inplace = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
        # A function of the user's that is kept whole (torch.fx.wrap) may write to what it is given.
        whose = str(getattr(node.target, "__module__", "") or "").partition(".")[0]
        inplace = inplace or whose not in _PURE
        return inplace or node.target in WRITES or name == "_assert" or name.endswith("_") or node.is_impure()
    return False
