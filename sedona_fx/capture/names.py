"""Names that a model may have and torch.fx cannot write as code: keywords, ``self``, attributes of graph modules."""

from __future__ import annotations

import keyword

from torch import fx, nn

from sedona_fx.errors import TraceError

_RESERVED = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) | frozenset(dir(fx.GraphModule))


def allow_names(model: nn.Module) -> None:
    """Make sure that graphs of a model can read its modules and tensors by their own names.

    If one is a Python keyword (``model.heads["class"]``), torch.fx is taught to read it by ``getattr``, as it does with
    names that start with a digit; other code that it writes stays the same.

    Raises:
        TraceError: a module of the model itself has a name that every ``fx.GraphModule`` has (``graph``, ``code``).
    """
    named = [*model.named_modules(remove_duplicate=False), *model.named_parameters(), *model.named_buffers()]
    paths = [path for path, _ in named]
    if taken := next((p for p in paths if p and p.partition(".")[0] in _RESERVED - frozenset(dir(nn.Module()))), None):
        raise TraceError(
            f"{taken.partition('.')[0]!r} is a name that torch.fx keeps for itself at the top of a model. Rename it, "
            "or wrap the model in a module that has it one level further down (self.inner = model)."
        )
    if any(keyword.iskeyword(part) for path in paths for part in path.split(".")):
        fx.graph._format_target = _format_target


def _format_target(base: str, target: str) -> str:
    """Return code that reads an attribute: ``self.out.linear``, ``getattr(self.out, "class").weight``."""
    for part in target.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        base = f"{base}.{part}" if plain else f'getattr({base}, "{part}")'
    return base


def free_self(node: fx.Node) -> None:
    """Give a node that would be the variable ``self`` in the code another name."""
    if node.name == "self":
        node._rename("self_")
