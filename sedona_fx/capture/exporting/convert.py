"""Rewrite an exported program in the graph dialect, so that no later pass need know which front end made a graph.

``torch.export`` gives a flat list of ATen operators: inputs and outputs without their containers, one node for each
tensor of the model. The rewritten graph has what the first front end's graphs have: one placeholder per argument, the
model's own output type, the user's tensors under the user's names, a module path at every node, and a node that reads a
parameter at each place where it is used.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.blame import recorded_line
from sedona_fx.capture.exporting.inline_regions import REGION
from sedona_fx.capture.graph_module import with_record
from sedona_fx.capture.tracer import holds_tensor
from sedona_fx.capture.whole.operators import WHOLE, WholeCall
from sedona_fx.capture.whole.reasons import TRANSFORM, NeedsTensors, is_transform
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import info, operation
from sedona_fx.ir.outputs import fields, is_container, is_leaf, is_object
from sedona_fx.ir.region import new_graph

_EXPORT_CHECKS = ("_assert_tensor_metadata", "_guards_fn")  # of dtypes and shapes: net(x) checks its inputs itself
_RESHAPE = torch.ops.aten.reshape.default  # a view where one is possible; works on other backends' layouts, too


class Converter:
    """Rewrites one exported program in the graph dialect.

    Args:
        model: the model that was exported.
        source: the program's graph.
        program: says which argument a placeholder of `source` belongs to.
        arguments: argument name -> value, as the model was exported with.
        model_output: what the model returned while it was exported, without objects. Its leaves are what the program
            returns, in the same order.
        calls: of the modules that stay whole.
        inside: what the paths of the program begin with, and those of the graph do not.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        source: fx.GraphModule,
        program: torch.export.ExportedProgram,
        arguments: Mapping[str, Any],
        model_output: Any,
        inside: str,
        calls: Sequence[WholeCall] = (),
    ) -> None:
        self.model, self.calls = model, calls
        self.source, self.program, self.arguments, self.model_output = source, program, arguments, model_output
        self.inside = inside
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.tensors: dict[str, Any] = {f"{inside}{name}": tensor for name, tensor in named}
        self.graph = new_graph()
        self.env: dict[fx.Node, Any] = {}  # node of the program -> its value in the new graph
        self.constants: dict[str, str] = {}  # name in the program -> name in the graph
        self.attributes: dict[str, Any] = {}

    def convert(self) -> tuple[fx.Graph, dict[str, Any]]:
        """Return the rewritten graph, and the tensors that its ``get_attr`` nodes read, by target."""
        self._add_placeholders()
        for node in self.source.graph.nodes:
            if node.op in ("placeholder", "get_attr") or _is_export_check(node):
                continue
            if node.op == "output":
                leaves = iter(fx.map_arg(node.args[0], self._converted))
                with_record(self.graph.output(self._build_output(self.model_output, leaves)))
                continue
            path = self._own(_module_path(node))
            if is_transform(node.target):
                line = recorded_line(str(node.meta.get("stack_trace")))
                raise NeedsTensors(f"{path or type(self.model).__name__}{line}: {TRANSFORM}", path)
            if self._is_part_of_whole_call(node):
                continue
            convert_argument = functools.partial(self._converted, path=path)
            args, kwargs = fx.map_arg(node.args, convert_argument), fx.map_arg(node.kwargs, convert_argument)
            target = _RESHAPE if node.target is torch.ops.aten.view.default else node.target
            new = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
            self.env[node] = with_record(new, path, region=node.meta.get(REGION))
        for node, paths in _returning_modules(self.source.graph).items():
            if node in self.env:
                info(self.env[node]).returned_by = tuple(filter(None, map(self._own, paths)))
        return self.graph, self.attributes

    def _is_part_of_whole_call(self, node: fx.Node) -> bool:
        """Whether a node calls a module that stays whole, or takes a tensor out of its result; it is rewritten then."""
        arguments: Any = node.args
        if node.target is WHOLE:
            call, path = self.calls[arguments[2]], self._own(_module_path(node))
            tensors, sizes = fx.map_arg(arguments[:2], functools.partial(self._converted, path=path))
            args, kwargs = call.arguments(tensors, sizes)
            self.env[node] = with_record(self.graph.call_module(call.path, tuple(args), kwargs), path)
            self.attributes[call.path] = self.model.get_submodule(call.path)
            return True
        if node.target is not operator.getitem or getattr(arguments[0], "target", None) is not WHOLE:
            return False
        value = self.env[arguments[0]]
        for key in self.calls[arguments[0].args[2]].keys(arguments[1]):
            value = with_record(self.graph.call_function(*_access(value, key)))
        self.env[node] = value
        return True

    def _own(self, path: str) -> str:
        """Return the path in the model that a path in the program stands for."""
        return f"{path}.".removeprefix(self.inside).removesuffix(".")

    def _add_placeholders(self) -> None:
        """Add one placeholder per argument, and the calls that take the program's flat inputs out of it."""
        flat = [node for node in self.source.graph.nodes if node.op == "placeholder"]
        spec = self.program.call_spec.in_spec
        assert spec is not None
        _, flat_indices = pytree.tree_unflatten(list(range(len(flat))), spec)
        placeholders = {name: self.graph.placeholder(name) for name, v in self.arguments.items() if holds_tensor(v)}
        for placeholder in placeholders.values():
            with_record(placeholder)
        for name, placeholder in placeholders.items():
            for keys, index in pytree.tree_flatten_with_path(flat_indices[name])[0]:
                value = placeholder
                for key in keys:
                    value = with_record(self.graph.call_function(*_access(value, key)))
                self.env[flat[index]] = value

    def _converted(self, node: fx.Node, path: str = "") -> Any:
        """Return the value that stands for a node of the program.

        A tensor of the model gets a new ``get_attr`` node, with the module path of its reader, each time it is used.
        """
        if node.op != "get_attr":
            return self.env[node]
        target = str(node.target)
        if target in self.tensors:
            name = self._own(target)
            self.attributes[name] = self.tensors[target]
        else:
            value = fx.graph_module._get_attr(self.source, target)
            if isinstance(value, torch.Generator):
                where = path or type(self.model).__name__
                raise NeedsTensors(
                    f"{where} draws from a torch.Generator of its own, of which torch.export keeps a copy: nobody "
                    "would seed that one, or make it anew.",
                    path,
                )
            name = self.constants.setdefault(target, f"_tensor_constant{len(self.constants)}")
            self.attributes[name] = value
        return with_record(self.graph.get_attr(name), path)

    def _build_output(self, value: Any, leaves: Iterator[Any]) -> Any:
        """Return nodes that build a value of the model's own output type from the program's outputs.

        Tuples, lists and plain dictionaries need no node: they may be arguments of the output node.
        """
        if is_leaf(value):
            return next(leaves)
        if is_object(value):
            raise TraceError(f"the model returns a {type(value).__name__}, which is no known container of tensors.")
        items = fields(value) if is_container(value) else []
        content = {key: self._build_output(item, leaves) for key, item in items}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._call(type(value), *content.values())
        if isinstance(value, (tuple, list)):
            return (tuple if isinstance(value, tuple) else list)(content.values())
        if type(value) is dict:
            return content
        if type(value) is OrderedDict:
            return self._call(OrderedDict, list(content.items()))
        if is_container(
            value
        ):  # a dataclass; Hugging Face's outputs are mappings as well, without fields that are None
            return self._call(type(value), **{str(key): item for key, item in content.items()})
        return value

    def _call(self, constructor: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return with_record(self.graph.call_function(constructor, args, kwargs))


def _access(value: fx.Node, key: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return function and arguments of the call that takes the item with a pytree key out of a value."""
    if isinstance(key, pytree.SequenceKey):
        return operator.getitem, (value, key.idx)
    if isinstance(key, pytree.MappingKey):
        return operator.getitem, (value, key.key)
    return getattr, (value, key.name)


def _is_export_check(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", node.target) in _EXPORT_CHECKS


def _module_stack(node: fx.Node) -> dict[str, Any]:
    """Return the module calls around a node, outermost first: key of the call -> (module path, class)."""
    return node.meta.get("nn_module_stack") or {}


def _module_path(node: fx.Node) -> str:
    stack = list(_module_stack(node).values())
    return str(stack[-1][0]) if stack else ""


def _returning_modules(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Return node -> paths of the modules whose output it is, innermost first.

    A node is the output of a call if it is the only tensor computed during that call that is read outside of it.
    """
    calls: dict[str, tuple[str, list[fx.Node]]] = {}  # key of the call -> (module path, nodes recorded during it)
    for node in graph.nodes:
        for key, (path, _) in _module_stack(node).items():
            if path and node.op == "call_function":
                calls.setdefault(key, (path, []))[1].append(node)
    returning: dict[fx.Node, list[str]] = {}
    for key, (path, nodes) in reversed(calls.items()):
        leaving = [n for n in nodes if _is_result(n) and any(key not in _module_stack(user) for user in n.users)]
        if len(leaving) == 1:
            returning.setdefault(leaving[0], []).append(path)
    return {node: tuple(sorted(paths, key=_depth, reverse=True)) for node, paths in returning.items()}


def _depth(path: str) -> int:
    return path.count(".")


def _is_result(node: fx.Node) -> bool:
    """Whether a node gives a new tensor, and not only the buffer that it has written to."""
    return isinstance(node.meta.get("val"), Tensor) and not _writes_attribute(node)


def _writes_attribute(node: fx.Node) -> bool:
    while node.op == "call_function" and operation(node).endswith("_") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"
