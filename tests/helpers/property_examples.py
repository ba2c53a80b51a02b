"""Programs that were difficult once, and how they were cut."""

from __future__ import annotations

from random_instructions import Instruction, Kind, Program
from random_programs import Cutting

_RAW, _IMAGE, _VECTOR = Kind("raw", 3), Kind("image"), Kind("vector")
DEAD_DRAWS = Program(
    (_RAW,),
    (
        Instruction("stem", (0,), _IMAGE, _RAW),
        Instruction("detach", (1,), _IMAGE, _IMAGE),
        Instruction("dropout", (2,), _IMAGE, _IMAGE),
        Instruction("dropout", (2,), _IMAGE, _IMAGE),
        Instruction("pool", (4,), _VECTOR, _IMAGE),
        Instruction("logits", (5,), _VECTOR, _VECTOR),
    ),
)
"""The first dropout is for nothing, but it draws: in the block that has what it reads, a value without a gradient."""


PROBE = Program(
    (_RAW,),
    (
        Instruction("stem", (0,), _IMAGE, _RAW),
        Instruction("detach", (1,), _IMAGE, _IMAGE),
        Instruction("conv", (2,), _IMAGE, _IMAGE),
        Instruction("conv", (3,), _IMAGE, _IMAGE),
        Instruction("pool", (4,), _VECTOR, _IMAGE),
        Instruction("logits", (5,), _VECTOR, _VECTOR),
    ),
    extra=1,
    returns="tuple",
)
"""The second output trains the stem. No block may end behind the detach: the first would have it, and not train it."""

EXPLICIT = (
    (PROBE, Cutting(2, "uniform", None, places=(50,))),
    (DEAD_DRAWS, Cutting(2, "uniform", None, places=(0,))),
)
