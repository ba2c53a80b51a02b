"""The README: its code runs, and its map of the code names every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::tqdm.TqdmWarning")
def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "assert_close" in code
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "blocks, cut by balanced" in capsys.readouterr().out


def test_code_organisation_names_every_file():
    section = README.split("## Code organisation")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", section, flags=re.MULTILINE))
    files = {str(p.relative_to(ROOT / "sedona_fx")) for p in (ROOT / "sedona_fx").rglob("*.py")}
    assert named == {name for name in files if not name.endswith("__init__.py")}


def test_every_picture_and_page_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
