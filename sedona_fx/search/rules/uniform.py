"""Uniform cuts, the baseline of SEDONA's paper."""

from __future__ import annotations

from dataclasses import dataclass

from sedona_fx.search.rules.layer_rule import LayerRule


@dataclass(frozen=True)
class Uniform(LayerRule):
    """Cut after base layer ``floor(-1 + jB/K)``, j = 1..K-1, of B (0-based; SEDONA, section 4.1).

    VGG-19, K = 4: 3, 7, 11. Argument and budget: as in the base class.
    """

    def layers(self, count: int, blocks: int) -> list[int]:
        """Return the base layers to cut after."""
        return uniform_layers(count, blocks)


def uniform_layers(base_layers: int, blocks: int) -> list[int]:
    """Return the 0-based base layers after which a uniform plan cuts, ``floor(-1 + jB/K)`` for j = 1..K-1.

    Args:
        base_layers: B, the number of base layers.
        blocks: K.
    """
    return [j * base_layers // blocks - 1 for j in range(1, blocks)]
