"""Batches on their way: what blocks keep of them until their gradients arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sedona_fx.runtime.run import Values


@dataclass
class Held:
    """What a block keeps of a batch until its gradient arrives: what it read; with stashed weights its exports and
    their graph, too, and what it takes to make that graph again."""

    inputs: Values
    exports: Values = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


@dataclass
class Flight:
    """A batch on its way: its step, what the blocks hold of it, and the gradients that later blocks handed down."""

    step: int
    training: bool
    held: list[Held | None]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def abandon(self) -> None:
        """Let nothing come back of this batch."""
        self.held, self.gradients = [None] * len(self.held), {}
