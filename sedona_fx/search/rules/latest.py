"""Latest cuts: a control with one deep first block, followed by the shortest blocks possible."""

from __future__ import annotations

from dataclasses import dataclass

from sedona_fx.search.rules.layer_rule import LayerRule


@dataclass(frozen=True)
class Latest(LayerRule):
    """Cut after each of the K - 1 base layers before the final one. VGG-19, K = 4: 12, 13, 14 (0-based).

    SEDONA's released plans come near to this (VGG-19: 5, 12, 13); it costs no search at all. Argument and budget: as in
    the base class.
    """

    def layers(self, count: int, blocks: int) -> range:
        """Return the base layers to cut after."""
        return range(count - blocks, count - 1)
