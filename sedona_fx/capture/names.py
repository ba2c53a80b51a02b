"""Names that a model may have and torch.fx cannot write as code: keywords, ``self``, attributes of graph modules."""

from __future__ import annotations

import inspect
import keyword
from typing import Any

from torch import fx, nn

from sedona_fx.ir.program import OWN
from sedona_fx.ir.region import Root


def allow_names(model: nn.Module) -> None:
    """Make sure that graphs of a model can read its modules and tensors by their own names.

    If one is a Python keyword (``model.heads["class"]``), torch.fx is taught to read it by ``getattr``, as it does with
    names that start with a digit. If one is an attribute that every ``fx.GraphModule`` has (``graph``, ``code``), the
    code of graphs made here looks it up among layers and tensors. Other code that torch.fx writes stays the same.
    """
    parts = {part for path in _paths(model) for part in path.split(".")}
    if any(map(keyword.iskeyword, parts)) or not OWN.isdisjoint(parts):
        fx.graph._format_target = _format_target


def has_own_names(model: nn.Module) -> bool:
    """Whether a layer or tensor at the top of a model has the name of an attribute of every ``fx.GraphModule``."""
    return not OWN.isdisjoint((*model._modules, *model._parameters, *model._buffers, *vars(model)))


class Inside(nn.Module):
    """A module that does nothing but call the model inside of it, whose names are then no names at the top.

    Args:
        model: what it calls.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.inner = model

        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        vars(forward)["__signature__"] = inspect.signature(model.forward)
        self.forward = forward


INSIDE = "inner."
"""What the paths of a model begin with in :class:`Inside`."""


def _paths(model: nn.Module) -> list[str]:
    named = [*model.named_modules(remove_duplicate=False), *model.named_parameters(), *model.named_buffers()]
    return [path for path, _ in named]


def _format_target(base: str, target: str) -> str:
    """Return code that reads an attribute: ``self.out.linear``, ``getattr(self.out, "class").weight``."""
    for part in target.split("."):
        if isinstance(base, Root) and part in OWN:
            base = f'{base}.__getattr__("{part}")'
            continue
        plain = part.isidentifier() and not keyword.iskeyword(part)
        base = f"{base}.{part}" if plain else f'getattr({base}, "{part}")'
    return base


def free_self(node: fx.Node) -> None:
    """Give a node that would be the variable ``self`` in the code another name."""
    if node.name == "self":
        node._rename("self_")
