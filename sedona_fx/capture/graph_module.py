"""What the front ends share: records of nodes, and the module that runs a recorded graph, without dead code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from sedona_fx.capture.inplace import WRITES
from sedona_fx.ir.graph import INFO, NodeInfo, TensorSpec, operation
from sedona_fx.ir.program import Program
from sedona_fx.ir.region import Region

_PURE_PACKAGES = ("", "torch", "_operator", "operator", "builtins", "math", "collections")


def with_record(
    node: fx.Node, path: str = "", returned_by: tuple[str, ...] = (), *, region: Region | None = None
) -> fx.Node:
    """Give a new node its record, and return the node.

    Args:
        node: a node that a front end has made.
        path: module path of the code that the node stands for; empty for the model's own forward.
        returned_by: paths of the modules whose output the node is, innermost first.
        region: the autocast or no-grad region that it runs in.
    """
    node.meta[INFO] = NodeInfo(path=path, returned_by=returned_by, region=region)
    return node


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return shape, dtype and device of a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)


def build_graph_module(model: nn.Module, graph: fx.Graph, attributes: nn.Module | Mapping[str, Any]) -> fx.GraphModule:
    """Return a module that runs a recorded graph. Nodes that do nothing but compute an unread value are removed.

    Args:
        model: the recorded model. Its class name and its ``base_layers``, if it declares any, are carried over.
        graph: changed in place.
        attributes: where ``call_module`` and ``get_attr`` nodes find their targets: the model, or target -> value.
    """
    graph.eliminate_dead_code(is_impure)
    root = attributes if isinstance(attributes, nn.Module) else dict(attributes)
    gm = Program(root, graph, class_name=type(model).__name__)
    gm.meta["base_layers"] = tuple(getattr(model, "base_layers", ()))
    return gm


def is_impure(node: fx.Node) -> bool:
    """Whether a node may do more than return a value, so that it must stay even if nothing reads its value.

    These are modules (they may have state), in-place writes, assertions, and functions from outside of PyTorch and the
    standard library.
    """
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    # A function of the user's that is kept whole (torch.fx.wrap) may write to its arguments.
    package = str(getattr(node.target, "__module__", "") or "").partition(".")[0]
    name = operation(node)
    return (
        bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
        or package not in _PURE_PACKAGES
        or node.target in WRITES
        or name == "_assert"
        or name.endswith("_")
        or node.is_impure()
    )
