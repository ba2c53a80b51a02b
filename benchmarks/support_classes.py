"""The five classes of result of a row of the support table, and what puts a row into its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

NUMBERS = ("1", "2", "3", "4", "5", "6", "7", "8")
CLASSES = ("good", "unbalanced", "needs an option", "refused", "failed")
ASKED = 4
"""Blocks that every row asks for."""
UNEVEN = 1.5
"""A largest block of more than so many fair shares is unbalanced."""
BUILDING = "building and decoupling"
"""What a process does until it has a net; a reason that begins so is an error of another kind than a refusal."""


def result(row: Row) -> str:
    """Return the class of a row.

    - refused: ``decouple`` said why it cannot do this model;
    - failed: an error that is no refusal, a promise that is broken, or a model that should have been refused;
    - unbalanced: it works, and the largest block has more than 1.5 times a quarter of the work. A net that came out
      with fewer blocks is measured by the quarter as well;
    - needs an option: it works and is even, but only with options that the row passes (a loss is no option: whoever
      trains has one);
    - good: none of these. Rows that were measured before blocks were compared have no class: "".
    """
    if row["reason"]:
        refused = "front_end" not in row and not row["reason"].startswith(f"{BUILDING}: ")
        return "refused" if refused else "failed"
    if not works(row):
        return "failed"
    if "largest" not in row:
        return ""
    if min(row["largest"], row["largest_without_heads"]) > UNEVEN / ASKED:
        return "unbalanced"
    return "needs an option" if row["options"] else "good"


def works(row: Row) -> bool:
    """Whether a model was decoupled and no promise that was checked is broken."""
    checked = row["promises"]
    return not row["reason"] and set(checked) == set(NUMBERS) and all(r in ("kept", "-") for r in checked.values())


def share(row: Row) -> str:
    """Return the largest block's share of the work, as a table shows it; where heads alone make it large, without."""
    if "largest" not in row:
        return ""
    whole, own = row["largest"], row["largest_without_heads"]
    return f"{own:.0%} ({whole:.0%} with heads)" if whole > UNEVEN / ASKED >= own else f"{whole:.0%}"
