"""fx's tracer, taught what fx forgets: buffers by name, in-place operators, the module path of every node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.blame import current_line, user_line
from sedona_fx.capture.inplace import InplaceProxy
from sedona_fx.ir.graph import INFO, NodeInfo, describe, info
from sedona_fx.ir.outputs import without_objects


class Tracer(fx.Tracer):
    """Records one forward of a model.

    Args:
        leaves: modules that stay whole, besides PyTorch's own.
        values: argument name -> value; what holds no tensor is taken as it is, everything else becomes a placeholder.
            What is not named here keeps its default.

    Attributes:
        mode_reads: the modules that looked at their own ``training`` flag.
    """

    proxy_buffer_attributes = True  # otherwise buffers read in forward become nameless constants

    def __init__(self, leaves: frozenset[nn.Module], values: Mapping[str, Any]) -> None:
        super().__init__()
        self.leaves, self.values = leaves, values
        self.mode_reads: dict[nn.Module, None] = {}
        self._stack: list[str] = [""]
        self._failed_in: str | None = None
        self._asked: fx.Node | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a model's forward."""
        with torch.enable_grad(), watch_training_flags(self.mode_reads):
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make the placeholders. An argument left out has no node at all, and neither has one without a tensor."""
        given = {
            name: self.create_proxy("placeholder", name, (), {}) if holds_tensor(value) else value
            for name, value in self.values.items()
        }
        # The instance's own forward, if it has one.
        return (lambda root: without_objects(root.forward(**given))[0]), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays whole."""
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a stand-in that knows in-place operators."""
        return InplaceProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, remembering where we are."""
        path = self.path_of_module(m)
        self._stack.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self._failed_in = path if self._failed_in is None else self._failed_in
            raise
        finally:
            self._stack.pop()
        if isinstance(result, fx.Proxy) and path:
            record = info(result.node)
            record.returned_by = (*record.returned_by, path)
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node with a record."""
        node = super().create_node(*args, **kwargs)
        without_grad = "" if torch.is_grad_enabled() else current_line() or " "
        node.meta[INFO] = NodeInfo(path=self._stack[-1], without_grad=without_grad)
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse, and remember whose value was asked for."""
        try:
            return super().to_bool(obj)
        except Exception:
            self._asked = obj.node
            raise

    def iter(self, obj: fx.Proxy) -> Any:
        """Refuse (unless it is an unpacking), and remember whose values were asked for."""
        try:
            return super().iter(obj)
        except Exception:
            self._asked = obj.node
            raise

    def explain(self, error: Exception) -> str:
        """Say what stood in the way: module, file, line, source text, and which value was asked for."""
        where = self._failed_in or "the model's own forward"
        value = ""
        if self._asked is not None:
            value = f" It asks for the value of {self._asked.name!r}, made in {describe(self._asked)}."
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if "__cuda_array_interface__" in reason:  # PyTorch looked for numbers in a stand-in, as it would in an array
            reason = "it needs the numbers in a tensor, and there are none while a forward is recorded"
        return f"{where}{user_line(error)}: {reason}.{value}"


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in a nested value."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


@contextmanager
def watch_training_flags(reads: dict[nn.Module, None]) -> Iterator[None]:
    """Write down which modules are asked for their ``training`` flag.

    A property of the class comes before what the instances hold; for the time of a trace, as fx itself replaces
    ``__call__`` and ``__getattr__``. Leaf modules do not run in a trace.
    """

    def get(module: nn.Module) -> bool:
        if "training" not in vars(module):
            raise AttributeError("training")
        reads[module] = None
        return bool(vars(module)["training"])

    def put(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
