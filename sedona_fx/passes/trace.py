"""model -> TRACED: record what the model's forward does, once in train mode and once in eval mode.

Symbolic tracing can be silently wrong: a random branch freezes, a counter runs once, a buffer update vanishes. So a
trace is trusted only after checks: tracing drew no random number and changed no state, and one forward in each mode
gives exactly what the model gives, buffers included (:mod:`sedona_fx.passes.check`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.args import Args
from sedona_fx.errors import TraceError, did_you_mean
from sedona_fx.graph import Phase, copy_graph, info, verify
from sedona_fx.passes.check import check_equal_forward
from sedona_fx.passes.inplace import WRITES
from sedona_fx.passes.tracer import Tracer
from sedona_fx.passes.watch import StateWatch, keep_modes, locate_side_effect

WAYS_OUT = (
    "Ways out: name the module in leaf_modules=[...] to keep it whole (no cut inside it then), or move the decision "
    "out of forward (into __init__, or into torch.where)."
)


@dataclass(frozen=True)
class Traced:
    """The train graph and the eval graph of a model; one object where the two do not differ.

    ``mode_paths`` maps the modules that look at their own ``training`` flag while the graph is made to what that flag
    was in train mode and in eval mode: a graph is chosen for the net at once, so they must keep these flags. It is
    empty where the modes do not differ. ``output`` is what the model returned in train mode for the first two examples.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    mode_paths: Mapping[str, tuple[bool, bool]]
    output: Any


def trace(model: nn.Module, example: Args, *, leaf_modules: Collection[str] = ()) -> Traced:
    """Trace a model in train and in eval mode and prove both graphs against it.

    Args:
        model: the copy that the net will own. Its parameters, buffers and modes are as before afterwards.
        example: one batch; a few of its examples are run through the model and through both graphs. Arguments that
            hold no tensor are part of the graph.
        leaf_modules: module paths that stay whole.

    Returns:
        Graphs whose modules *are* the model's, each node with its module path and a site name that is the same in
        both graphs.

    Raises:
        TraceError: the forward cannot be recorded, or the recording does not do what the model does; with the line.
    """
    leaves = _leaves(model, [leaf_modules] if isinstance(leaf_modules, str) else leaf_modules)
    given = example.bind(model.forward)
    with keep_modes(model):
        model.train()
        train, reads = _trace_one(model, given, leaves)
        flags = {module: module.training for module in reads}
        model.eval()
        evaluation, reads = _trace_one(model, given, leaves)
        _name_sites(train.graph)
        _match_sites(train.graph, evaluation.graph)
        same = _same_graphs(train, evaluation)
        evaluation = train if same else evaluation
        paths = {} if same else {m: path for path, m in model.named_modules() if m in flags or m in reads}
        mode_paths = {path: (flags.get(m, True), m.training) for m, path in paths.items()}
    few = example.first(2)
    output = check_equal_forward(model, verify(train, Phase.TRACED), few, training=True)
    check_equal_forward(model, verify(evaluation, Phase.TRACED), few, training=False)
    return Traced(train, evaluation, mode_paths, output)


def _leaves(model: nn.Module, paths: Collection[str]) -> frozenset[nn.Module]:
    names = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if not isinstance(path, str) or path not in names or not path:
            raise TraceError(
                f"leaf_modules names {path!r}, which the model does not have{did_you_mean(str(path), names)}."
            )
    return frozenset(names[path] for path in paths)


def _trace_one(
    model: nn.Module, given: Mapping[str, Any], leaves: frozenset[nn.Module]
) -> tuple[fx.GraphModule, list[nn.Module]]:
    """Return the graph of the model in its present mode, and the modules that looked at their mode."""
    tracer = Tracer(leaves, given)
    watch = StateWatch(model)
    try:
        graph = tracer.trace(model)
        changed = watch.changed()
        graph.eliminate_dead_code(_is_impure)
        graph, _ = copy_graph(graph)  # without the tracer's class, which would be asked to unpickle the graph
        gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    except Exception as error:
        raise TraceError(f"cannot record the forward of {tracer.explain(error)} {WAYS_OUT}") from error
    finally:
        watch.restore()
    if changed:
        line = locate_side_effect(model, lambda: Tracer(leaves, given).trace(model))
        raise TraceError(
            f"tracing {type(model).__name__} in {'train' if model.training else 'eval'} mode {changed}: this would "
            f"happen once, now, and never again in training{line}. {WAYS_OUT}"
        )
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    return gm, list(tracer.mode_reads)


def _is_impure(node: fx.Node) -> bool:
    """Keep whatever may do something besides returning a value: modules with state, in-place writes, assertions."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        inplace = bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None
        return inplace or node.target in WRITES or name == "_assert" or name.endswith("_") or node.is_impure()
    return False


def _base_name(node: fx.Node) -> str:
    """Name a node by module path and operation, without the occurrence."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
    return f"{info(node).path}:{operation}"


def _name_sites(graph: fx.Graph, taken: Collection[str] = ()) -> None:
    """Name every node that has no site yet by module path, operation and occurrence."""
    seen: Counter[str] = Counter()
    returned: Counter[str] = Counter()
    used = {info(node).site for node in graph.nodes} | set(taken)
    for order, node in enumerate(graph.nodes):
        record, base = info(node), _base_name(node)
        record.order = order
        while not record.site:
            seen[base] += 1
            site = base if seen[base] == 1 else f"{base}#{seen[base]}"
            record.site = site if site not in used else ""
        used.add(record.site)
        paths = [path for path in record.returned_by if not (node.op == "call_module" and path == node.target)]
        returned.update(paths)
        record.returned_by = tuple(path if returned[path] == 1 else f"{path}#{returned[path]}" for path in paths)


def _match_sites(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Give nodes of the eval graph the sites of the train nodes that they are; names of their own to the others.

    Counting occurrences would not do: an ``add`` that stands only in the train graph would shift the names of all later
    ones. The two graphs are aligned as texts are.
    """
    first, second = list(train.nodes), list(evaluation.nodes)
    _align(first, second, lambda n: f"{_base_name(n)} {[a for a in n.args if not isinstance(a, fx.Node)]}")
    _name_sites(evaluation, taken=[info(node).site for node in first])


def _align(train: list[fx.Node], evaluation: list[fx.Node], key: Callable[[fx.Node], str]) -> None:
    """Match nodes with the same key in the same order; between them, nodes that have at least the same name."""
    matcher = SequenceMatcher(None, [key(n) for n in train], [key(n) for n in evaluation], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            for one, other in zip(train[a:b], evaluation[c:d], strict=True):
                info(other).site = info(one).site
        elif tag == "replace" and key is not _base_name:
            _align(train[a:b], evaluation[c:d], _base_name)


def _same_graphs(train: fx.GraphModule, evaluation: fx.GraphModule) -> bool:
    """Whether two graphs do the same, constants that the forward made included."""

    def facts(gm: fx.GraphModule) -> list[tuple[str, str]]:
        def site(node: fx.Node) -> str:
            return info(node).site

        return [
            (site(n), repr((n.op, n.target, fx.map_arg(n.args, site), fx.map_arg(n.kwargs, site))))
            for n in gm.graph.nodes
        ]

    if facts(train) != facts(evaluation):
        return False
    for node in train.graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target):
            a, b = getattr(train, str(node.target)), getattr(evaluation, str(node.target))
            if a is not b and not (isinstance(a, torch.Tensor) and torch.equal(a, b)):
                return False
    return True
