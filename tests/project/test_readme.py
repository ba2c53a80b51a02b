"""The README: its code runs, and its map of the code names every package; packages name their files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sedona_fx"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::tqdm.TqdmWarning")
def test_the_code_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "assert_close" in code
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "blocks, cut by balanced" in capsys.readouterr().out


def test_code_organisation_names_every_package():
    section = README.split("## Code organisation")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE)[1:]
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`(\w+/?)`", row)} - {"train"}
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert named == there - {"__init__", "train"}
    assert "`train/`" in section


@pytest.mark.parametrize("folder", [p.parent for p in PACKAGE.rglob("__init__.py") if p.parent != PACKAGE], ids=str)
def test_a_package_names_its_files(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    _, _, files = text.partition("\nFiles\n")
    rows = re.findall(r"^(\w+/?) {2,}\S", files, flags=re.MULTILINE)
    named = set(rows or re.findall(r"``(\w+)``", text))  # the passes have a table of their own
    there = {p.stem if p.is_file() else f"{p.name}/" for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert named == there - {"__init__", "__pycache__/"}


def test_every_picture_and_page_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
