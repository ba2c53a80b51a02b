"""model -> TRACED: record what the model's forward does, once in train mode and once in eval mode.

Symbolic tracing can be silently wrong: a random branch freezes, a counter runs once, a buffer update vanishes. So a
trace is trusted only after checks: tracing drew no random number and changed no state, and one forward in each mode
gives exactly what the model gives, buffers included (:mod:`sedona_fx.passes.check`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.args import Args
from sedona_fx.errors import TraceError, did_you_mean
from sedona_fx.graph import INFO, NodeInfo, Phase, describe, info, verify
from sedona_fx.passes.check import (
    StateWatch,
    check_equal_forward,
    keep_modes,
    locate_side_effect,
    user_frame,
)

WAYS_OUT = (
    "Ways out: name the module in leaf_modules=[...] to keep it whole (no cut inside it then), or move the decision "
    "out of forward (into __init__, or into torch.where)."
)


@dataclass(frozen=True)
class Traced:
    """The train graph and the eval graph of a model; one object where the two do not differ.

    ``mode_paths`` are the modules whose code runs differently in the two modes outside of leaf modules: their
    ``training`` flag must be that of the whole net, since a graph is chosen for the net at once. ``output`` is what the
    model returned in train mode for the first two examples.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: tuple[str, ...]
    output: Any


def trace(model: nn.Module, example: Args, *, leaf_modules: Collection[str] = ()) -> Traced:
    """Trace a model in train and in eval mode and prove both graphs against it.

    Args:
        model: the copy that the net will own. Its parameters, buffers and modes are as before afterwards.
        example: one batch; a few of its examples are run through the model and through both graphs.
        leaf_modules: module paths that stay whole.

    Returns:
        Graphs whose modules *are* the model's, each node with its module path and a site name that is the same in
        both graphs.

    Raises:
        TraceError: the forward cannot be recorded, or the recording does not do what the model does; with the line.
    """
    names = dict(model.named_modules())
    for path in leaf_modules:
        if path not in names:
            raise TraceError(f"leaf_modules names {path!r}, which the model does not have{did_you_mean(path, names)}.")
    given = example.bind(model.forward)
    with keep_modes(model):
        model.train()
        train = _trace_one(model, given, leaf_modules)
        model.eval()
        evaluation = _trace_one(model, given, leaf_modules)
    differing = _differing_paths(train.graph, evaluation.graph)
    if differing is None:
        evaluation = train
    few = example.first(2)
    output = check_equal_forward(model, train, few, training=True)
    check_equal_forward(model, evaluation, few, training=False)
    return Traced(train, evaluation, differing or (), output)


def _trace_one(model: nn.Module, given: dict[str, Any], leaf_modules: Collection[str]) -> fx.GraphModule:
    concrete = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name not in given and parameter.default is not inspect.Parameter.empty
    }
    tracer = _Tracer(frozenset(leaf_modules))
    watch = StateWatch(model)
    try:
        graph = tracer.trace(model, concrete_args=concrete)
    except Exception as error:
        raise TraceError(_explain(error, tracer)) from error
    finally:
        changed = watch.restore()
    if changed:
        line = locate_side_effect(model, lambda: _Tracer(frozenset(leaf_modules)).trace(model, concrete_args=concrete))
        raise TraceError(
            f"tracing {type(model).__name__} in {'train' if model.training else 'eval'} mode {changed}: this would "
            f"happen once, now, and never again in training{line}. {WAYS_OUT}"
        )
    _drop_concrete_inputs(graph, concrete)
    _name_sites(graph)
    graph.eliminate_dead_code(_is_impure)
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    return verify(gm, Phase.TRACED)


class _Tracer(fx.Tracer):
    """fx's tracer, keeping buffers by name, leaf modules of the user's choice, and the module path of every node."""

    proxy_buffer_attributes = True  # otherwise buffers read in forward become nameless constants

    def __init__(self, leaf_modules: frozenset[str]) -> None:
        super().__init__()
        self.leaf_modules = leaf_modules
        self.stack: list[str] = [""]
        self.failed_in: str | None = None
        self.asked_value: fx.Node | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaf_modules or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        self.stack.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = path if self.failed_in is None else self.failed_in
            raise
        finally:
            self.stack.pop()
        if isinstance(result, fx.Proxy) and path:
            record = info(result.node)
            record.returned_by = (*record.returned_by, path)
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[INFO] = NodeInfo(path=self.stack[-1])
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked_value = obj.node
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Any:
        self.asked_value = obj.node
        return super().iter(obj)


def _explain(error: Exception, tracer: _Tracer) -> str:
    where = tracer.failed_in or "the model's own forward"
    value = ""
    if tracer.asked_value is not None:
        value = f" It asks for the value of {tracer.asked_value.name!r}, made in {describe(tracer.asked_value)}."
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot record the forward of {where}{user_frame(error)}: {reason}.{value} {WAYS_OUT}"


def _is_impure(node: fx.Node) -> bool:
    """Keep whatever may do something besides returning a value: modules with state, in-place writes, assertions."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        inplace = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
        return inplace or name in ("setitem", "_assert") or name.endswith("_") or node.is_impure()
    return False


def _drop_concrete_inputs(graph: fx.Graph, concrete: Iterable[str]) -> None:
    """Remove the placeholders of arguments left at their defaults, and the checks that fx adds for them."""
    fixed = set(concrete)
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target).removesuffix("_1") in fixed | {str(node.target)} & fixed:
            for user in list(node.users):
                for second in list(user.users):
                    if second.op == "call_function" and second.target is torch._assert:
                        graph.erase_node(second)
                if not user.users:
                    graph.erase_node(user)
            if not node.users:
                graph.erase_node(node)


def _name_sites(graph: fx.Graph) -> None:
    """Name every node by module path, operation and occurrence, so that train and eval graphs can be matched."""
    seen: Counter[str] = Counter()
    returned: Counter[str] = Counter()
    for order, node in enumerate(graph.nodes):
        record = info(node)
        record.order = order
        if node.op in ("call_module", "get_attr", "placeholder"):
            base = str(node.target)
        else:
            operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
            base = f"{record.path}:{operation}"
        seen[base] += 1
        record.site = base if seen[base] == 1 else f"{base}#{seen[base]}"
        paths = [path for path in record.returned_by if not (node.op == "call_module" and path == node.target)]
        returned.update(paths)
        record.returned_by = tuple(path if returned[path] == 1 else f"{path}#{returned[path]}" for path in paths)


def _differing_paths(train: fx.Graph, evaluation: fx.Graph) -> tuple[str, ...] | None:
    """Return the module paths whose nodes differ between the two graphs, or None if the graphs are the same."""

    def facts(graph: fx.Graph) -> dict[str, tuple[str, str]]:
        def site(node: fx.Node) -> str:
            return info(node).site

        return {
            info(node).site: (
                info(node).path,
                repr((node.op, node.target, fx.map_arg(node.args, site), fx.map_arg(node.kwargs, site))),
            )
            for node in graph.nodes
        }

    first, second = facts(train), facts(evaluation)
    if list(first.items()) == list(second.items()):
        return None
    differing = {k for k in first.keys() | second.keys() if first.get(k) != second.get(k)}
    return tuple(sorted({(first.get(k) or second[k])[0] for k in differing}))
