"""Generated parts of pages that are otherwise written by hand: they stand between two comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sedona_fx.files import replacing


def fill(page: Path, part: str, text: str) -> None:
    """Put `text` between ``<!-- part: begin -->`` and ``<!-- part: end -->``.

    Raises:
        ValueError: the page has no such place.
    """
    content = page.read_text()
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{page} has no one place between {begin!r} and {end!r} for the table: put the two lines in.")
    before, _, rest = content.partition(begin)
    after = rest.partition(end)[2]
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines]) + "\n"
