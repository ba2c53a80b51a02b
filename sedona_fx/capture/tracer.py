"""An fx tracer that records what fx leaves out: buffers by name, in-place operators, the module path of every node."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.blame import current_line, user_line
from sedona_fx.capture.hooks import TENSOR_HOOKS, hooks_of
from sedona_fx.capture.inplace import InplaceProxy
from sedona_fx.capture.layer_stacks import PackingStack, enter_stacks, is_leaf
from sedona_fx.capture.names import free_self
from sedona_fx.capture.regions import RegionWatch, watch_regions
from sedona_fx.capture.whole.kinds import stays_whole
from sedona_fx.capture.whole.own_backward import own_functions_recorded
from sedona_fx.capture.whole.reasons import BACKWARD, METHOD, NeedsTensors, Undecided, is_opaque, reason_of
from sedona_fx.capture.whole.scripted import scripted_calls_recorded
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import INFO, NodeInfo, describe, info
from sedona_fx.ir.outputs import without_objects


class Tracer(fx.Tracer):
    """Records one forward of a model.

    Args:
        leaves: modules that become one node each, besides PyTorch's own layers, modules with hooks, and those that
            cannot be looked into.
        values: argument name -> value. Values with a tensor in them become placeholders, others are used as they are.
            Arguments without a value keep their default.

    Attributes:
        mode_reads: the modules that read their own ``training`` flag, as keys in the order of the first read.
    """

    proxy_buffer_attributes = True  # otherwise buffers read in forward become nameless constants

    def __init__(self, leaves: frozenset[nn.Module], values: Mapping[str, Any]) -> None:
        super().__init__()
        self.leaves, self.values = leaves, values
        self.mode_reads: dict[nn.Module, None] = {}
        self._regions = RegionWatch()
        self._packing: list[PackingStack | None] = [None]  # of the encoders whose forward runs now, innermost last
        self._thread = threading.get_ident()
        self._path_stack: list[str] = [""]  # paths of the modules whose forward runs now, innermost last
        self._failed_in: str | None = None  # path of the innermost module that raised
        self._asked_for: fx.Node | None = None  # the node whose value Python code needed

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of a model's forward."""
        with (
            torch.enable_grad(),
            watch_training_flags(self.mode_reads),
            watch_regions(strict=True) as self._regions,
            enter_stacks(self._packing),
            own_functions_recorded(),
            scripted_calls_recorded(),
        ):
            return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder for each argument with a tensor in it; no other argument gets a node."""
        arguments = {
            name: self.create_proxy("placeholder", name, (), {}) if holds_tensor(value) else value
            for name, value in self.values.items()
        }
        # `root.forward`, not `root_fn`: the instance may have a forward of its own.
        return (lambda root: without_objects(root.forward(**arguments))[0]), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one node."""
        if m in self.leaves or hooks_of(m) or stays_whole(m):
            return True
        known = is_leaf(m)
        return super().is_leaf_module(m, module_qualified_name) if known is None else known

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that records in-place operators."""
        return InplaceProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module; its path goes into the records of the nodes made meanwhile, and of its result.

        fx sends the calls of all modules here, those of other threads as well.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self._path_stack.append(path)
        try:
            call = functools.partial(super().call_module, m, forward)
            stack = self._packing[-1]
            if stack is not None and m in stack.layers:
                result = stack.record(call, path, args[0], kwargs)
            else:
                result = call(args, kwargs)
        except Exception:
            self._failed_in = path if self._failed_in is None else self._failed_in
            raise
        finally:
            self._path_stack.pop()
        if isinstance(result, fx.Proxy) and path:
            record = info(result.node)
            record.returned_by = (*record.returned_by, path)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute that a forward reads: a proxy for a tensor of the model, but not in another thread."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a node and its proxy; of ``torch.autograd.grad``, a tuple of proxies.

        A method that puts a hook on a tensor, or gradients into ``.grad``, would be taken for one that does nothing.
        """
        if kind == "call_method" and target in TENSOR_HOOKS:
            raise TypeError("it registers a hook on a tensor, which a graph does not keep")
        if (kind == "call_method" and target == "backward") or target is torch.autograd.backward:
            raise TypeError(BACKWARD)
        if kind == "call_method" and args[0] and isinstance(args[0][0], torch._C.ScriptModule):
            raise TypeError(METHOD)  # the node would hide whose weights it reads
        proxy: Any = super().create_proxy(kind, target, *args, **kwargs)
        if target is torch.autograd.grad:
            info(proxy.node).line = current_line()
            return tuple(proxy[k] for k in range(len(args[0][1])))
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node with a record of where it was made."""
        node = super().create_node(*args, **kwargs)
        free_self(node)
        is_call = node.op in ("call_module", "call_function", "call_method")
        node.meta[INFO] = NodeInfo(path=self._path_stack[-1], region=self._regions.current() if is_call else None)
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise, as fx does, and remember for the error text which node's value was needed."""
        try:
            return super().to_bool(obj)
        except Exception:
            self._asked_for = obj.node
            raise

    def iter(self, obj: fx.Proxy) -> Any:
        """Raise (unless it is an unpacking), as fx does, and remember which node's values were needed."""
        try:
            return super().iter(obj)
        except Exception:
            self._asked_for = obj.node
            raise

    def explain(self, error: Exception) -> TraceError:
        """Return the error that says why tracing failed: module, file, line, source text, whose value was needed."""
        where = self._failed_in or "the model's own forward"
        needed_value = ""
        if self._asked_for is not None:
            needed_value = f" It asks for the value of {self._asked_for.name!r}, made in {describe(self._asked_for)}."
        text = f"cannot record the forward of {where}{user_line(error)}: {reason_of(error)}.{needed_value}"
        if is_opaque(error):
            return NeedsTensors(text, self._failed_in or "")
        return Undecided(text, self._failed_in or "") if self._asked_for is not None else TraceError(text)


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in a nested value."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


@contextmanager
def watch_training_flags(reads: dict[nn.Module, None]) -> Iterator[None]:
    """Add each module whose ``training`` flag is read in the body to `reads`.

    ``training`` becomes a property of ``nn.Module`` meanwhile: a property of the class takes precedence over the
    attributes of instances. fx replaces ``__call__`` and ``__getattr__`` in the same way during a trace. The forward of
    a leaf module does not run in a trace, so its reads are not seen.
    """

    def get_flag(module: nn.Module) -> bool:
        if "training" not in vars(module):
            raise AttributeError("training")
        reads[module] = None
        return bool(vars(module)["training"])

    def set_flag(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    nn.Module.training = property(get_flag, set_flag)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training
