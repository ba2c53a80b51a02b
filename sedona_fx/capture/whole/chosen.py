"""Which modules stay whole because their code cannot be recorded: found one after the other, as front ends fail."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from sedona_fx.capture.whole.reasons import NeedsTensors, Undecided
from sedona_fx.errors import TraceError

WAYS_OUT = (
    "Ways out: name the module in leaf_modules=[...] to keep it whole (no cut inside it then; lines of the model's own "
    "forward go into a module of their own first); decouple only a part of the model with root='...' and let the rest "
    "run as it is; or move the decision out of forward (into __init__, or into torch.where)."
)
CHOSEN = "whole_modules"
"""Key in the ``meta`` of a train graph: path -> why, for modules that stay whole without having been named."""
log = logging.getLogger(__name__)


class ChosenWhole:
    """The modules of a model that stay whole.

    If two modules of a class have to, all of that class do: they have the same code, and to find the others one by one
    takes a recording each.

    Args:
        model: the model.
        asked: modules that the user keeps whole.

    Attributes:
        reasons: path -> why, for those that the user has not named; none is inside of another one.
        tries_export: whether ``torch.export`` is tried although there is a module which, kept whole, lets symbolic
            tracing go on; not if it fails for another reason.
    """

    def __init__(self, model: nn.Module, asked: Collection[nn.Module]) -> None:
        self.model, self._asked = model, frozenset(asked)
        self.reasons: dict[str, str] = {}
        self.tries_export = True

    @property
    def leaves(self) -> frozenset[nn.Module]:
        """All modules that stay whole."""
        return self._asked | {self.model.get_submodule(path) for path in self.reasons}

    def add(self, symbolic: TraceError, exported: TraceError | None) -> None:
        """Keep one more module whole, that whose code the front ends could not record.

        Args:
            symbolic: why symbolic tracing failed.
            exported: why ``torch.export`` failed; None: it was not tried.

        Raises:
            TraceError: there is no such module, or it is the model itself.
        """
        self.tries_export = isinstance(exported, NeedsTensors)
        both = f"{symbolic} torch.export cannot record it either: {exported}"
        errors = [error for error in (exported, symbolic) if isinstance(error, NeedsTensors)]
        for error in errors:
            if self._is_new(error.path):
                opaque = isinstance(symbolic, NeedsTensors) and not isinstance(symbolic, Undecided)
                self._choose(error.path, str(error if isinstance(error, Undecided) else symbolic if opaque else both))
                return
        if all(isinstance(error, Undecided) for error in errors):
            raise TraceError(f"{both} {WAYS_OUT}") from symbolic
        reason = symbolic if isinstance(symbolic, NeedsTensors) else both
        raise TraceError(
            f"{reason} Put these lines into a module of their own, which is kept whole then, with no cut inside of it; "
            "or decouple only a part of the model with root='...'."
        ) from symbolic

    def can_go_on(self, symbolic: TraceError) -> bool:
        """Whether one more module can be kept whole for why symbolic tracing failed."""
        return isinstance(symbolic, NeedsTensors) and self._is_new(symbolic.path)

    def tell(self) -> None:
        """Log which modules stay whole, and why."""
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            stay = "stays whole, with no cut inside of it" if len(paths) == 1 else "stay whole, with no cut inside"
            log.warning("%s %s: %s", ", ".join(map(repr, paths)), stay, reason)

    def _is_new(self, path: str) -> bool:
        """Whether a path is that of a module which does not stay whole yet."""
        return bool(path) and not any(f"{path}.".startswith(f"{other}.") for other in self.reasons)

    def _choose(self, path: str, reason: str) -> None:
        kind = type(self.model.get_submodule(path))
        again = any(type(self.model.get_submodule(other)) is kind for other in self.reasons)
        same = [other for other, module in self.model.named_modules() if other and type(module) is kind]
        for other in (path, *(same if again else ())):
            self.reasons.setdefault(other, reason)
        inside = [p for p in self.reasons if any(p.startswith(f"{other}.") for other in self.reasons)]
        for other in inside:
            del self.reasons[other]
