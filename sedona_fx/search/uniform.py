"""Uniform cuts: SEDONA's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.search.problem import Decision, Problem, first_heads


@dataclass(frozen=True)
class Uniform:
    """Cut after base layer ``floor(-1 + jB/K)``, j = 1..K-1 (0-based; SEDONA, section 4.1). VGG-19, K = 4: 3, 7, 11.

    Each cut gets the first candidate head.
    """

    needs_data: ClassVar[bool] = False

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads."""
        places = problem.places()
        cuts = [places[k] for k in uniform_layers(len(places) + 1, problem.blocks)]
        return Decision(cuts, first_heads(problem, cuts), {"search": "uniform"})


def uniform_layers(base_layers: int, blocks: int) -> list[int]:
    """Return the 0-based base layers behind which a uniform plan of `blocks` blocks cuts."""
    return [j * base_layers // blocks - 1 for j in range(1, blocks)]
