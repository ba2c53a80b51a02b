"""What is changed in an exported ONNX model before it is written: its names, and operators on short floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sedona_fx.extras import require

_SHORT = ("BFLOAT16", "FLOAT16")


def rename(model: Any, *, inputs: Sequence[str], outputs: Sequence[str], inside: str) -> None:
    """Give inputs and outputs their names, and the weights those that they have in the net.

    ONNX has one namespace for all values. An output of the name of an input is called ``output.NAME``; values inside
    make way.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        inside: what the names of the weights begin with in the model.
    """
    graph = model.graph
    names: dict[int, str] = {}
    taken: set[str] = set()

    def free(name: str, form: str) -> str:
        while name in taken:
            name = form.format(name)
        taken.add(name)
        return name

    for value, name in zip(graph.inputs, inputs, strict=True):
        names[id(value)] = free(name, "{}_")
    for value, name in zip(graph.outputs, outputs, strict=True):
        names[id(value)] = free(name, "output.{}")
    values = [value for value in _values(graph) if value.name]
    for value in values:
        if id(value) not in names:
            own = value.name.removeprefix(inside) if value.is_initializer() else value.name
            names[id(value)] = free(own, "{}_")
    for index, value in enumerate(values):  # first out of each other's way
        value.name = f"{index}//"
    for value in values:
        value.name = names[id(value)]


def short_floats(model: Any) -> set[str]:
    """Return the names of the floating-point types with fewer than 32 bits in a model, as PyTorch names them.

    Args:
        model: an ``onnx_ir.Model``.
    """
    names = {value.dtype.name.lower() for value in _values(model.graph) if value.dtype is not None}
    return names & {name.lower() for name in _SHORT}


def compute_in_float32(model: Any) -> bool:
    """Let all operators on short floats compute in float32, and round their results.

    ONNX Runtime has few kernels for bfloat16 on a CPU. PyTorch's own compute in float32 there, and round, as well.

    Args:
        model: an ``onnx_ir.Model``, changed in place.

    Returns:
        Whether there were such operators.
    """
    ir = require("onnx_ir", extra="onnx", purpose="exporting to ONNX")
    short = {getattr(ir.DataType, name) for name in _SHORT}
    nodes = [node for node in _nodes(model.graph) if node.op_type != "Cast" and not list(_graphs(node))]
    changed = False
    for node in nodes:
        if not any(value is not None and value.dtype in short for value in node.inputs):
            continue
        changed = True
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in short:
                cast = _cast(ir, value, ir.DataType.FLOAT, f"{node.name}_input_{index}")
                node.prepend(cast)
                node.replace_input_with(index, cast.outputs[0])
        for index, value in enumerate(node.outputs):
            if value.dtype in short:
                uses = tuple(value.uses())
                cast = _cast(ir, value, value.dtype, f"{node.name}_output_{index}")
                value.dtype = ir.DataType.FLOAT
                node.append(cast)
                for user, place in uses:
                    user.replace_input_with(place, cast.outputs[0])
                outputs = node.graph.outputs
                for place, output in enumerate(outputs):
                    if output is value:
                        outputs[place] = cast.outputs[0]
    return changed


def _cast(ir: Any, value: Any, dtype: Any, name: str) -> Any:
    """Return a node that casts a value to a dtype."""
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    attributes = [ir.AttrInt64("to", int(dtype))]
    return ir.Node("", "Cast", [value], attributes, outputs=[result], name=f"node_{name}")


def _values(graph: Any) -> Iterator[Any]:
    """Yield every value of a graph and of the graphs inside of its nodes."""
    yield from (*graph.inputs, *graph.initializers.values())
    for node in graph:
        yield from node.outputs
        for inner in _graphs(node):
            yield from _values(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs inside of a node, such as the branches of a condition."""
    return (attribute.value for attribute in node.attributes.values() if attribute.type.name == "GRAPH")
