"""The primary output: where it is in what the model returns, and how a head's output takes its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sedona_fx.errors import OutputError
from sedona_fx.graph import TensorSpec

Key = str | int | None
"""Attribute, mapping key or index of the primary output; None where the model returns a bare tensor."""


def fields(output: Any) -> list[tuple[Key, Any]]:
    """Return the (key, value) pairs of what a model returns; a bare tensor is one pair with the key None."""
    if isinstance(output, Mapping):
        return list(output.items())
    if hasattr(output, "_fields"):
        return [(name, getattr(output, name)) for name in output._fields]
    if dataclasses.is_dataclass(output) and not isinstance(output, TensorSpec):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return list(enumerate(output))
    return [(None, output)]


def pick(output: Any, key: Key) -> Any:
    """Return the field of an output that a key names."""
    return output if key is None else dict(fields(output))[key]


def _is_float(value: Any) -> bool:
    return isinstance(value, (TensorSpec, Tensor)) and value.dtype.is_floating_point


def find_primary(output: Any, wanted: Key = None) -> Key:
    """Return the key of the primary output: `wanted`, else ``logits``, else the only or first float tensor.

    Args:
        output: what the model returns, tensors or :class:`TensorSpec` at its leaves.
        wanted: the user's ``output=``: an attribute, a key or an index.

    Raises:
        OutputError: nothing of that name, or no float tensor at all.
    """
    found = fields(output)
    floats = [key for key, value in found if _is_float(value)]
    if wanted is not None:
        if wanted in floats:
            return wanted
        raise OutputError(
            f"output={wanted!r} names no float tensor in what the model returns ({type(output).__name__}); "
            f"float tensors are {floats or 'none'}."
        )
    if "logits" in floats:
        return "logits"
    if floats:
        return floats[0]
    raise OutputError(
        f"the model returns {type(output).__name__} with no float tensor that a loss could be about; name one with "
        "output=... (an attribute, a key or an index of what the model returns)."
    )


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """How the loss sees outputs: which field is primary, and the model's own type around it.

    ``auxiliary`` are the fields that exist only in training (GoogLeNet's two classifiers): where the loss gets the bare
    tensor, their losses are added with ``aux_weight``.
    """

    key: Key
    kind: type | None
    names: tuple[Key, ...]
    auxiliary: tuple[Key, ...] = ()
    aux_weight: float = 0.3

    @classmethod
    def of(cls, output: Any, key: Key, auxiliary: tuple[Key, ...] = ()) -> OutputFormat:
        """Describe an output (tensors or specs at its leaves) whose primary field is `key`."""
        kind = None if key is None else type(output)
        return cls(key, kind, tuple(k for k, _ in fields(output)), auxiliary)

    @property
    def bare(self) -> bool:
        """Whether the loss gets the tensor itself (a bare tensor or a namedtuple) and not the model's output type."""
        return self.kind is None or hasattr(self.kind, "_fields")

    def wrap(self, primary: Tensor) -> Any:
        """Put a head's output into the model's own output type, the other fields None."""
        if self.bare:
            return primary
        values = {name: primary if name == self.key else None for name in self.names}
        if self.kind is not None and issubclass(self.kind, (list, tuple)):
            return self.kind(values.values())
        try:
            return self.kind(**values)  # type: ignore[misc, arg-type]
        except TypeError:
            return self.kind(values)  # type: ignore[misc, call-arg]

    def head_loss(self, loss: Callable[[Any, Any], Tensor], head_output: Tensor, target: Any) -> Tensor:
        """Return the local loss of a head."""
        return loss(self.wrap(head_output), target)

    def final_loss(self, loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """Return the loss on the model's own output, auxiliary training outputs included.

        For a bare tensor or a namedtuple: ``loss(primary) + aux_weight * sum(loss(auxiliary))``, in the order of the
        fields from the last to the first (aux2 before aux1 in GoogLeNet's tuple stands aux2 first).
        """
        if not self.bare or isinstance(output, Tensor):
            return loss(output, target)
        total = loss(pick(output, self.key), target)
        for name in self.auxiliary:
            value = pick(output, name)
            if value is not None:
                total = total + self.aux_weight * loss(value, target)
        return total
