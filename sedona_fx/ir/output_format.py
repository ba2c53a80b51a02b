"""How a head's output is put in the place of the primary output, in the form that the loss reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sedona_fx.ir.outputs import Key, Step, fields, pick, split_local


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """The form in which the loss reads outputs: which field is primary, and the model's own output type.

    Attributes:
        key: of the primary output.
        kind: the model's output type; None if the model returns a bare tensor.
        names: the keys of all fields.
        inner: the format of the field that the primary output is inside of, if it is no field itself.
        given: the fields that heads are given, since they hold no gradient and need no activation.
        auxiliary: the fields that exist only in training (GoogLeNet's two classifiers). If the loss reads the bare
            tensor, their losses are added to its own.
        aux_weight: factor of these losses.
    """

    key: Key
    kind: type | None
    names: tuple[Step, ...]
    auxiliary: tuple[Step, ...] = ()
    given: tuple[Step, ...] = ()
    aux_weight: float = 0.3
    inner: OutputFormat | None = None

    @classmethod
    def of(cls, output: Any, key: Key, auxiliary: tuple[Step, ...] = ()) -> OutputFormat:
        """Return the format of an output (tensors or specs at its leaves) whose primary field is `key`."""
        kind = None if key is None else type(output)
        inner = None
        if isinstance(key, tuple):
            inner = cls.of(pick(output, key[0]), key[1:] if len(key) > 2 else key[1])
        return cls(key, kind, tuple(k for k, _ in fields(output)), auxiliary, inner=inner)

    @property
    def first(self) -> Step:
        """The key of the field that is the primary output, or that it is inside of."""
        return self.key[0] if isinstance(self.key, tuple) else self.key

    @property
    def bare(self) -> bool:
        """Whether the loss reads the primary tensor itself and not the model's output type.

        So it is if the model returns a bare tensor or a namedtuple.
        """
        return self.kind is None or (hasattr(self.kind, "_fields") and self.inner is None)

    def wrap(self, primary: Tensor, others: Mapping[Step, Any] | None = None) -> Any:
        """Return a head's output in the form that the loss reads: in the model's output type, other fields are None.

        Args:
            primary: what the head gives.
            others: values for fields that would be None.
        """
        return primary if self.bare else self._wrapped(primary, others or {})

    def _wrapped(self, primary: Tensor, others: Mapping[Step, Any]) -> Any:
        field = primary if self.inner is None else self.inner._wrapped(primary, {})
        values: dict[Any, Any] = dict.fromkeys(self.names) | dict(others) | {self.first: field}
        kind: Any = self.kind
        if hasattr(kind, "_fields"):
            return kind(**values)
        is_dataclass = dataclasses.is_dataclass(kind)
        if issubclass(kind, (list, tuple)):
            return kind(values.values())
        if is_dataclass:
            try:
                return kind(**values)
            except Exception:  # its __init__ requires values that a head does not have, or does not accept every field
                instance: Any = object.__new__(kind)
                for name, value in values.items():
                    object.__setattr__(instance, name, value)
                return instance
        return kind(**values) if all(isinstance(name, str) for name in values) else kind(values)

    def head_loss(self, loss: Callable[[Any, Any], Tensor], local: Any, target: Any) -> Tensor:
        """Return the local loss of a head: `loss` of its output in the model's output type, and of what it is given."""
        head_output, given = split_local(local)
        return loss(self.wrap(head_output, given), target)

    def final_loss(self, loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
        """Return the loss of the model's own output, auxiliary training outputs included.

        For a bare tensor or a namedtuple it is ``loss(primary) + aux_weight * sum(loss(auxiliary))``, summed in the
        order of the fields (GoogLeNet's namedtuple has aux2 before aux1).
        """
        if not self.bare or isinstance(output, Tensor):
            return loss(output, target)
        total = loss(pick(output, self.key), target)
        for name in self.auxiliary:
            value = pick(output, name)
            if value is not None:
                total = total + self.aux_weight * loss(value, target)
        return total
