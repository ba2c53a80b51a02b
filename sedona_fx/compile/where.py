"""Where the user allows cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sedona_fx.ir.stretches.shares import Measure


@dataclass(frozen=True)
class Where:
    """Where the user allows cuts.

    Attributes:
        blocks: number of blocks wanted.
        max_live: how many activations may cross at a cut. None: as few as give the number of blocks, and let them share
            the work about evenly.
        root: module path outside of which there is no cut; empty for the whole model.
        no_cut: module paths inside of which there is no cut.
        named: cuts that the user names, which are legal however many activations cross there: a name, or a module path
            with ``"end"`` or ``"beginning"``.
        measure: what the blocks share evenly if a search chooses the cuts. None: none does.
        default_heads: whether every block but the last gets a built-in head, so that cuts are of use only where one
            fits.
    """

    blocks: int = 1
    max_live: int | None = None
    root: str = ""
    no_cut: tuple[str, ...] = ()
    named: Sequence[str | tuple[str, str]] = ()
    measure: Measure | None = None
    default_heads: bool = False
