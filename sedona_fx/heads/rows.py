"""Where a tensor holds the examples of a batch, and a head that gets them first wherever they are.

Not every activation is (N, ...). Sequence-first layers work on (T, N, D), a siamese net on ``torch.cat([a, b])``, a
video net on frames that are folded into the batch, (N * F, C, H, W). Heads are built for (N, ...) all the same:
:class:`ArrangedHead` moves and unfolds what it reads, and puts the head's output into the form of the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """Where a tensor holds the examples of a batch of N.

    Attributes:
        dim: the dimension that grows with the batch.
        each: how many rows of that dimension belong to one example; the size is N * each.
        together: whether the rows of an example lie next to each other, (N, each), as after ``x.flatten(0, 1)``; else
            they are N apart, (each, N), as after ``torch.cat([a, b])``.
    """

    dim: int = 0
    each: int = 1
    together: bool = True

    def unfolded(self, tensor: Tensor) -> Tensor:
        """Return a view with the batch first, (N, ...), and behind it the rows of an example, (N, each, ...)."""
        moved = tensor.movedim(self.dim, 0) if self.dim else tensor
        if self.each == 1:
            return moved
        if self.together:
            return moved.unflatten(0, (-1, self.each))
        return moved.unflatten(0, (self.each, -1)).transpose(0, 1)

    def folded(self, tensor: Tensor) -> Tensor:
        """Return what :meth:`unfolded` was given."""
        if self.each > 1:
            tensor = (tensor if self.together else tensor.transpose(0, 1)).flatten(0, 1)
        return tensor.movedim(0, self.dim) if self.dim else tensor


@dataclass(frozen=True)
class Arrangement:
    """How the activation at a cut becomes what a head reads, and what the head gives the form of the model's output.

    Where an example has as many rows in both, nothing is unfolded: each row counts as an example.

    Attributes:
        activation: where the activation holds the examples.
        output: where the primary output holds them.
        frames: whether the rows of an example come behind the channels, as the frames of a video, (N, C, each, H, W);
            else before them, as tokens, (N, each, D).
        output_frames: the same for the output.
        mean: whether the rows of an example are averaged before the head reads them.
    """

    activation: Rows = Rows()
    output: Rows = Rows()
    frames: bool = False
    output_frames: bool = False
    mean: bool = False

    @property
    def by_row(self) -> bool:
        """Whether activation and output have the same rows, so that nothing is unfolded."""
        return self.activation.each == self.output.each

    @property
    def is_plain(self) -> bool:
        """Whether the batch is first in both, and nothing has to be done."""
        same_order = self.activation.each == 1 or self.activation.together == self.output.together
        return self.by_row and same_order and not self.activation.dim and not self.output.dim

    def enter(self, activation: Tensor) -> Tensor:
        """Return what the head reads, batch first."""
        if self.by_row:
            rows = self.activation.unfolded(activation)
            return Rows(each=self.output.each, together=self.output.together).folded(rows)
        unfolded = self.activation.unfolded(activation)
        if self.activation.each == 1:
            return unfolded
        if self.mean:
            return unfolded.mean(1)
        return unfolded.movedim(1, 2) if self.frames else unfolded

    def leave(self, output: Tensor) -> Tensor:
        """Return a head's output, batch first, in the form of the model's own."""
        if self.by_row:
            return output.movedim(0, self.output.dim) if self.output.dim else output
        return self.output.folded(output.movedim(2, 1) if self.output_frames else output)

    def wanted(self, output: Tensor) -> Tensor:
        """Return what the head has to give, batch first, for an output of the model: what :meth:`leave` undoes."""
        if self.by_row:
            return output.movedim(self.output.dim, 0) if self.output.dim else output
        unfolded = self.output.unfolded(output)
        return unfolded.movedim(1, 2) if self.output_frames else unfolded


class ArrangedHead(nn.Module):
    """A head behind an activation that does not have the batch first, or for such an output.

    Args:
        head: a head that reads and gives tensors with the batch first.
        arrangement: how they lie in the model.
        free_output: whether what the head gives goes to a loss of the user's own as it is.
    """

    def __init__(self, head: nn.Module, arrangement: Arrangement, *, free_output: bool = False) -> None:
        super().__init__()
        self.head, self.arrangement, self.free_output = head, arrangement, free_output

    def forward(self, activation: Tensor) -> Any:
        """Return the head's output for an activation."""
        return self.leave(self.head(self.arrangement.enter(activation)))

    def leave(self, output: Any) -> Any:
        """Return what the inner head gives in the form that the loss reads."""
        return output if self.free_output else self.arrangement.leave(output)

    def extra_repr(self) -> str:
        """Show how the activation lies."""
        return repr(self.arrangement)


def entering(head: nn.Module | None, activation: Tensor) -> Tensor:
    """Return the activation at a cut as the head there reads it: with the batch first."""
    arranged = (module for module in (head.modules() if head is not None else ()) if isinstance(module, ArrangedHead))
    inside = next(arranged, None)
    return activation if inside is None else inside.arrangement.enter(activation)


def shape_after(function: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of ``function(tensor)`` for a tensor of a shape."""
    return tuple(function(torch.empty(shape, device="meta")).shape)
