"""The second front end: ``torch.export``, for models that symbolic tracing cannot record.

It runs the forward on fake tensors, so Python code on shapes, types and settings is no obstacle. What it gives is one
flat program of ATen operators with the mode baked in; here it becomes a graph as the first front end makes them: one
placeholder an argument, the model's own output type, the user's tensors under the user's names, every node with its
module path, every parameter read where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging
import operator
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.graph import INFO, NodeInfo, operation
from sedona_fx.outputs import map_tensors
from sedona_fx.passes.check import same_bits
from sedona_fx.passes.symbolic import is_impure
from sedona_fx.passes.tracer import holds_tensor, watch_training_flags
from sedona_fx.passes.watch import StateWatch, keep_state, seed_everything, user_line

_CHECKS = ("_assert_tensor_metadata", "_guards_fn")  # of dtypes and shapes: net(x) checks its inputs itself
_RESHAPE = torch.ops.aten.reshape.default  # a view wherever one can be had, and on other backends' layouts, too
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41)


def record_by_export(model: nn.Module, given: Mapping[str, Any]) -> tuple[fx.GraphModule, list[nn.Module], bool]:
    """Return the graph of the model in its present mode, the modules that looked at their mode, and if the batch is
    free.

    Raises:
        TraceError: the program cannot be captured, or the forward changed state or drew numbers outside of the graph.
    """
    example = _unusual_batch(given)
    watch = StateWatch(model)
    reads: dict[nn.Module, None] = {}
    changes: list[str] = []
    # torch.export takes back what a forward does to attributes: look before it does.
    notes: list[tuple[Any, str]] | None = []

    def look(*_: Any) -> None:
        nonlocal notes
        if change := watch.changed(tensors=False):
            changes.append(change)
            notes = watch.replaced_attributes()

    handle = model.register_forward_hook(look)
    try:
        with _quietly(), torch.enable_grad(), watch_training_flags(reads):
            size = Args(**example).batch_size()
            program = torch.export.export(model, (), example, dynamic_shapes=_free_batch(example, size), strict=False)
            source = program.module()
    except Exception as error:
        raise TraceError(_reason(error)) from error
    finally:
        handle.remove()
        after = watch.restore()
    if not after and changes and notes and _are_scratch(model, given, notes):
        changes = []  # written before they are read in every forward: nobody sees what an earlier one left there
    if changed := next(filter(None, [*changes, after]), ""):
        raise TraceError(f"its forward {changed}, which would happen once, now, and never again in training.")
    assert isinstance(source, fx.GraphModule)
    graph, attributes = _Converter(model, source, program, given).convert()
    graph.eliminate_dead_code(is_impure)
    gm = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    inputs = [node.meta.get("val") for node in source.graph.nodes if node.op == "placeholder"]
    fixed = any(isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], int) for value in inputs)
    return gm, list(reads), size is not None and not fixed


def _are_scratch(model: nn.Module, given: Mapping[str, Any], notes: list[tuple[Any, str]]) -> bool:
    """Whether the model computes the same whatever stood in these attributes before: it only writes notes there."""

    def run(poisoned: bool) -> Any:
        with keep_state(model), torch.no_grad():
            for attributes, name in notes if poisoned else ():
                attributes[name] = object()  # whoever reads this fails
            seed_everything(0)
            return model(**map_tensors(torch.clone, Args(**given).first(2).kwargs))

    weights = [(p, p._version, p.detach().clone()) for p in model.parameters()]
    try:
        same = same_bits(run(poisoned=False), run(poisoned=True))
    except Exception:
        same = False
    overwritten = [(p, value) for p, version, value in weights if p._version != version]
    for parameter, value in overwritten:
        parameter.data.copy_(value)
    return same and not overwritten


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch.export from printing a whole program and its warnings: what went wrong is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _unusual_batch(given: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat examples until their number is unlike every other size: else the program would take one for the other."""
    args = Args(**given)
    size = args.batch_size()
    if size is None:
        return dict(given)
    taken = {extent for tensor in args.tensors() for extent in tensor.shape}
    wanted = next(prime for prime in itertools.chain(_PRIMES, itertools.count(43, 2)) if prime not in taken)
    return args.map(lambda t: t[torch.arange(wanted, device=t.device) % size] if t.dim() else t).kwargs


def _free_batch(example: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Say which dimension of every input is the batch."""

    def free(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() and size is not None else None

    return {name: pytree.tree_map(free, value) for name, value in example.items()}


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no reason given'}{user_line(error)}."


class _Converter:
    """Rewrites one exported program into the graph dialect."""

    def __init__(
        self, model: nn.Module, source: fx.GraphModule, program: torch.export.ExportedProgram, given: Mapping[str, Any]
    ) -> None:
        self.source, self.program, self.given = source, program, given
        self.tensors: dict[str, Any] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.constants: dict[str, str] = {}  # name in the program -> name in the graph
        self.attributes: dict[str, Any] = {}

    def convert(self) -> tuple[fx.Graph, dict[str, Any]]:
        """Return the graph and what its ``get_attr`` nodes read, by target."""
        self._inputs()
        for node in self.source.graph.nodes:
            if node.op in ("placeholder", "get_attr") or _is_check(node):
                continue
            if node.op == "output":
                leaves = fx.map_arg(node.args[0], self._value)
                out_spec = self.program.call_spec.out_spec
                assert out_spec is not None
                self._record(self.graph.output(self._rebuilt(pytree.tree_unflatten(list(leaves), out_spec))), "")
                continue
            path = _path(node)
            read = functools.partial(self._value, path=path)
            args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
            target = _RESHAPE if node.target is torch.ops.aten.view.default else node.target
            made = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
            self._record(made, path)
            self.env[node] = made
        for node, names in _returned(self.source.graph).items():
            if node in self.env:
                self.env[node].meta[INFO].returned_by = names
        return self.graph, self.attributes

    def _record(self, node: fx.Node, path: str) -> None:
        node.meta[INFO] = NodeInfo(path=path)

    def _inputs(self) -> None:
        flat = [node for node in self.source.graph.nodes if node.op == "placeholder"]
        spec = self.program.call_spec.in_spec
        assert spec is not None
        _, places = pytree.tree_unflatten(list(range(len(flat))), spec)
        holders = {name: self.graph.placeholder(name) for name, value in self.given.items() if holds_tensor(value)}
        for node in holders.values():
            self._record(node, "")
        for name, holder in holders.items():
            for keys, index in pytree.tree_flatten_with_path(places[name])[0]:
                value = holder
                for key in keys:
                    value = self.graph.call_function(*_step(value, key))
                    self._record(value, "")
                self.env[flat[index]] = value

    def _value(self, node: fx.Node, path: str = "") -> Any:
        """Return what stands for a node of the program: a tensor of the model is read anew at each of its uses."""
        if node.op != "get_attr":
            return self.env[node]
        target = str(node.target)
        if target not in self.tensors:
            name = self.constants.setdefault(target, f"_tensor_constant{len(self.constants)}")
            self.attributes[name] = fx.graph_module._get_attr(self.source, target)
        else:
            name = target
            self.attributes[name] = self.tensors[target]
        made = self.graph.get_attr(name)
        self._record(made, path)
        return made

    def _rebuilt(self, value: Any) -> Any:
        """Return nodes that build the model's own output type; tuples, lists and dictionaries need none."""
        if isinstance(value, (fx.Node, type(None), bool, int, float, str)):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._call(type(value), tuple(map(self._rebuilt, value)), {})
        if type(value) in (tuple, list):
            return type(value)(map(self._rebuilt, value))
        if type(value) is dict:
            return {key: self._rebuilt(inner) for key, inner in value.items()}
        if type(value) is OrderedDict:
            return self._call(OrderedDict, ([(key, self._rebuilt(inner)) for key, inner in value.items()],), {})
        if isinstance(value, Mapping):  # Hugging Face's outputs are dataclasses and mappings without what is None
            return self._call(type(value), (), {str(key): self._rebuilt(inner) for key, inner in value.items()})
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return self._call(type(value), (), {name: self._rebuilt(getattr(value, name)) for name in names})
        raise TraceError(f"the model returns a {type(value).__name__}, which is no known container of tensors.")

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = self.graph.call_function(function, args, kwargs)
        self._record(made, "")
        return made


def _step(value: fx.Node, key: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the call that takes one inner value out of an argument."""
    if isinstance(key, pytree.SequenceKey):
        return operator.getitem, (value, key.idx)
    if isinstance(key, pytree.MappingKey):
        return operator.getitem, (value, key.key)
    return getattr, (value, key.name)


def _is_check(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", node.target) in _CHECKS


def _path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _returned(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Return which calls of modules end at a node: it alone, of the tensors made in the call, is read outside of it."""
    calls: dict[str, tuple[str, list[fx.Node]]] = {}
    inside: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        inside[node] = set(stack)
        for key, (path, _) in stack.items():
            if path and node.op == "call_function":
                calls.setdefault(key, (path, []))[1].append(node)
    found: dict[fx.Node, list[str]] = {}
    for key, (path, nodes) in reversed(calls.items()):
        leaving = [n for n in nodes if _is_result(n) and any(key not in inside[user] for user in n.users)]
        if len(leaving) == 1:
            found.setdefault(leaving[0], []).append(path)
    return {node: tuple(sorted(paths, key=_depth, reverse=True)) for node, paths in found.items()}


def _depth(path: str) -> int:
    return path.count(".")


def _is_result(node: fx.Node) -> bool:
    """Whether a node gives a tensor, and not just a buffer again that it has written to."""
    return isinstance(node.meta.get("val"), Tensor) and not _writes_attribute(node)


def _writes_attribute(node: fx.Node) -> bool:
    while node.op == "call_function" and operation(node).endswith("_") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"
