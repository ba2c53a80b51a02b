"""The module that runs a graph: an ``fx.GraphModule`` in which a model's layers and tensors may have any name.

Every ``fx.GraphModule`` has attributes of its own (``graph``, ``code``, ``meta``, ``recompile``), and a model may have
a layer of such a name at its top. In a :class:`Program` both are there: layers and tensors are looked up in the
registries in which every ``nn.Module`` keeps them, before anything else of that name. So nothing has to be renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from sedona_fx.ir.pickled import from_pickle

OWN = frozenset({*vars(fx.GraphModule(nn.Module(), fx.Graph())), *dir(fx.GraphModule)} - {*dir(nn.Module())})
"""Names that every ``fx.GraphModule`` has for itself, and no other module."""
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class _Graph(fx.Graph):
    """The graph of a program with such names."""

    def lint(self) -> None:
        """Check the graph, as ``fx.Graph.lint`` does.

        Raises:
            RuntimeError: it is not well-formed, or a target is not there.
            ValueError: a target is of the wrong type.
        """
        owner, self.owning_module = self.owning_module, None
        try:
            super().lint()
        finally:
            self.owning_module = owner
        if owner is None:
            return
        for node in self.nodes:
            if node.op == "call_function" and not callable(node.target):
                raise ValueError(f"the target of {node.name!r} cannot be called")
            if node.op in ("call_module", "get_attr"):
                try:
                    value = attribute(owner, str(node.target))
                except AttributeError:
                    raise RuntimeError(f"the target {node.target!r} of {node.name!r} is not there") from None
                if node.op == "call_module" and not isinstance(value, nn.Module):
                    raise RuntimeError(f"the target {node.target!r} of {node.name!r} is no module")


class Program(fx.GraphModule):
    """Runs a graph; as ``fx.GraphModule``, but for the names in :data:`OWN`, which its layers and tensors may have.

    Args:
        root: where ``call_module`` and ``get_attr`` nodes find their targets: a module, or target -> value.
        graph: what it runs.
        class_name: what it is printed as.
    """

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "GraphModule") -> None:
        if OWN.isdisjoint(name.partition(".")[0] for name in _names(root, graph)):
            super().__init__(root, graph, class_name)
            return
        super().__init__(nn.Module(), fx.Graph(), class_name)
        if isinstance(root, nn.Module):
            self.training = root.training
        graph.__class__ = _Graph  # a copy of a graph is an fx.Graph again
        self.graph = graph
        for target in sorted(dict.fromkeys(_names(root, graph)), key=lambda name: name.count(".")):
            install(self, target, attribute(root, target) if isinstance(root, nn.Module) else root[target])

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what fx keeps under one of its own names may be set beside a layer of that name."""
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module at a path."""
        first, _, rest = target.partition(".")
        if first in OWN and (module := self._modules.get(first)) is not None:
            return module.get_submodule(rest)
        return super().get_submodule(target)

    def __reduce__(self) -> Any:
        """Return what pickle needs: a program is made again from its code, as fx does it, with its regions."""
        _, (body, imports) = super().__reduce__()
        return from_pickle, (body, imports, Program)

    def _deepcopy_init(self) -> Callable[..., None]:
        return Program.__init__


def attribute(module: nn.Module, target: str) -> Any:
    """Return the module or tensor at a dotted path, or another attribute if there is none of that name.

    Raises:
        AttributeError: there is nothing.
    """
    value: Any = module
    for name in target.split("."):
        registry = next((r for r in _REGISTRIES if name in vars(value).get(r, ())), None)
        value = vars(value)[registry][name] if registry is not None else getattr(value, name)
    return value


def _names(root: nn.Module | Mapping[str, Any], graph: fx.Graph) -> Iterable[str]:
    """Return what a program gets from `root`: the targets of its nodes; of a copy of a program, everything."""
    yield from (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    if isinstance(root, fx.graph_module._CodeOnlyModule):  # what fx copies programs by
        for registry in _REGISTRIES:
            yield from (name for name, value in vars(root)[registry].items() if value is not None)


def install(program: nn.Module, target: str, value: Any) -> None:
    """Put a module or tensor at its path in a graph module, through containers that are made where there are none."""
    *path, last = target.split(".")
    owner = program
    for name in path:
        inner = owner._modules.get(name)
        if inner is None:
            inner = owner._modules[name] = nn.Module()
        owner = inner
    if type(owner) is not nn.Module and owner is not program:
        return  # a module of the model, which has it
    if isinstance(value, nn.Module):
        owner._modules[last] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[last] = value
    elif isinstance(value, torch.Tensor):
        owner._buffers[last] = value
    else:
        vars(owner)[last] = value
