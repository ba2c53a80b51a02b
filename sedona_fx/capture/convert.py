"""From an exported program to the graph dialect: the same operators in the form that the first front end gives them.

One placeholder an argument, the model's own output type, the user's tensors under the user's names, every node with its
module path, every parameter read where it is used.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.tracer import holds_tensor
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import INFO, NodeInfo, operation
from sedona_fx.ir.outputs import fields, is_container, is_leaf, is_object

_CHECKS = ("_assert_tensor_metadata", "_guards_fn")  # of dtypes and shapes: net(x) checks its inputs itself
_RESHAPE = torch.ops.aten.reshape.default  # a view wherever one can be had, and on other backends' layouts, too


class Converter:
    """Rewrites one exported program, a flat list of tensors, into the graph dialect.

    Args:
        model: what was exported.
        source: the program's graph.
        program: says which argument a placeholder belongs to.
        given: argument name -> value.
        returned: what the model returned while it was exported, without objects; the program gives its leaves.
    """

    def __init__(
        self,
        model: nn.Module,
        source: fx.GraphModule,
        program: torch.export.ExportedProgram,
        given: Mapping[str, Any],
        returned: Any,
    ) -> None:
        self.source, self.program, self.given, self.returned = source, program, given, returned
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
                computed = iter(fx.map_arg(node.args[0], self._value))
                self._record(self.graph.output(self._rebuilt(self.returned, computed)), "")
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

    def _rebuilt(self, value: Any, computed: Iterator[Any]) -> Any:
        """Return nodes that build the model's own output type; tuples, lists and dictionaries need none."""
        if is_leaf(value):
            return next(computed)
        if is_object(value):
            raise TraceError(f"the model returns a {type(value).__name__}, which is no known container of tensors.")
        inner = {key: self._rebuilt(item, computed) for key, item in fields(value)} if is_container(value) else {}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._call(type(value), tuple(inner.values()), {})
        if isinstance(value, (tuple, list)):
            return (tuple if isinstance(value, tuple) else list)(inner.values())
        if type(value) is dict:
            return inner
        if type(value) is OrderedDict:
            return self._call(OrderedDict, (list(inner.items()),), {})
        if is_container(value):  # a dataclass, or Hugging Face's outputs: both that and mappings, without what is None
            return self._call(type(value), (), {str(key): item for key, item in inner.items()})
        return value

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
