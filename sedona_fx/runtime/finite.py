"""Refuse to write weights that have turned infinite or NaN: they would take the place of the last good ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from sedona_fx.errors import CheckpointError
from sedona_fx.runtime.gradients import first_not_finite


def finite_constants(module: nn.Module) -> frozenset[str]:
    """Return the names of the buffers and frozen parameters that are finite, and so have to stay it.

    Others may be infinite on purpose, such as a mask. Parameters that are trained always have to be finite.
    """
    return frozenset(name for name, value in _constants(module) if first_not_finite([(name, value)]) is None)


def tensors_to_check(module: nn.Module, constants: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield by name what has to be finite in a file of a module's weights.

    Args:
        module: whose weights are to be written.
        constants: what :func:`finite_constants` returned before it was trained.
    """
    yield from ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    yield from ((name, value) for name, value in _constants(module) if name in constants)


def refuse_not_finite(named: Iterable[tuple[str, Tensor]], *, refusal: str, advice: str) -> None:
    """Check that tensors are finite before they are written.

    Args:
        named: the tensors by name; the first that is not finite is named.
        refusal: what is not done then, for the error's text.
        advice: what to do then, for the error's text.

    Raises:
        CheckpointError: one is not.
    """
    found = first_not_finite(named)
    if found is not None:
        raise CheckpointError(f"{refusal}: {found[0]!r} holds {found[1]}. {advice}")


def _constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the frozen parameters, and the buffers that a file of weights has."""
    yield from ((name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad)
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer
