"""The rest of the support table: classes of results, what a row's digest depends on, packages that are not there."""

import ast
import itertools
from dataclasses import replace
from functools import partial

import pytest
import support
import versions
from catalogue import batches, catalogue
from catalogue.entry import Entry
from row import measure
from support_classes import CLASSES, NUMBERS, result, share
from support_page import page
from torch import nn

ENTRIES = catalogue()
ROW = {
    "family": "own",
    "name": "net",
    "note": "",
    "reason": "",
    "front_end": "symbolic",
    "promises": dict.fromkeys(NUMBERS, "kept"),
    "largest": 0.3,
    "largest_without_heads": 0.3,
    "why": "",
    "options": [],
    "seconds": 1.0,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "good"),
        ({"promises": {**ROW["promises"], "4": "-"}}, "good"),
        ({"largest": 0.375, "largest_without_heads": 0.375}, "good"),
        ({"largest": 0.5, "largest_without_heads": 0.26}, "good"),
        ({"largest": 0.38, "largest_without_heads": 0.38}, "unbalanced"),
        ({"largest": 0.38, "largest_without_heads": 0.38, "options": ["root"]}, "unbalanced"),
        ({"options": ["root"]}, "needs an option"),
        ({"promises": {**ROW["promises"], "8": "other numbers"}}, "failed"),
        ({"promises": {"1": "kept"}}, "failed"),
        ({"reason": "should have been refused (rand)"}, "failed"),
    ],
)
def test_each_row_has_one_class(change, expected):
    assert result({**ROW, **change}) == expected


def test_a_refusal_is_told_from_a_crash():
    stopped = {key: value for key, value in ROW.items() if key not in ("front_end", "largest")} | {"promises": {}}
    assert result({**stopped, "reason": "cannot record the forward"}) == "refused"
    assert result({**stopped, "reason": "building and decoupling: took longer than 300 s"}) == "failed"


def test_rows_without_shares_have_no_class():
    old = {key: value for key, value in ROW.items() if key != "largest"}
    assert result(old) == ""
    assert share(old) == ""


def test_the_page_counts_every_class():
    rows = [
        ROW,
        {**ROW, "largest": 0.5, "largest_without_heads": 0.5, "why": "why: one operation"},
        {**ROW, "options": ["root"]},
        {**ROW, "largest": 0.5, "largest_without_heads": 0.26},
        {**ROW, "promises": {"1": "kept"}},
    ]
    lines = page(rows).splitlines()
    assert (
        next(line for line in lines if line.startswith("| all ")) == "| all | 5 | 4 | 2 | 1 | 1 | 0 | 1 | 5 symbolic |"
    )
    assert all(name in page(rows) for name in CLASSES)
    assert any("26% (50% with heads)" in line for line in lines)
    assert any("why: one operation" in line for line in lines)
    assert any("| root= |" in line for line in lines)


def chain(widths):
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def test_a_row_has_the_share_of_the_largest_block():
    """The largest layer has 64 of 112 parts of the work; with fewer blocks than four, the error says why."""
    build = partial(chain, [12, 8, 8, 64, 10])
    row = measure(Entry("chain", "own", build, partial(batches.images, 2)), lambda _: None, only=())
    shares = [12 * 8, 8 * 8, 8 * 64, 64 * 10]
    assert row["largest"] >= max(shares) / sum(shares)
    assert row["blocks"] == 4
    assert row["why"].startswith("why: ")
    assert result({**row, "promises": ROW["promises"]}) == "unbalanced"


def test_fewer_blocks_are_measured_by_the_blocks_asked_for():
    row = measure(
        Entry("chain", "own", partial(chain, [12, 64, 10]), partial(batches.images, 2)), lambda _: None, only=()
    )
    assert row["blocks"] == 2
    assert "4" in row["why"]
    assert result({**row, "promises": ROW["promises"]}) == "unbalanced"


# ---- what is done again ---------------------------------------------------------------------------------------------


def test_a_row_is_done_again_for_its_own_changes_alone():
    first, second = (ENTRIES[f"timm/{name}"] for name in ("convnext_atto", "lcnet_050"))
    assert versions.version(first) == versions.version(replace(first, note="another note", name="another name"))
    assert versions.version(first) != versions.version(second)
    assert versions.version(first) != versions.version(replace(first, options={"max_live": 2}))
    assert versions.version(first) != versions.version(replace(first, pair=partial(batches.images, 96)))


def test_what_a_row_can_run_is_found_through_packages():
    reached = versions._reached("row")
    assert {"row", "promises", "catalogue.entry", "sedona_fx.ir.graph"} <= reached
    assert not {"support_page", "catalogue.timm_models", "sedona_fx.recipes.pareto"} & reached
    compiler = versions._reached("sedona_fx.decouple")
    assert {"sedona_fx.runtime.engine", "sedona_fx.search.rules.balanced", "sedona_fx.export.onnx"} <= compiler


def test_comments_and_docstrings_are_no_change(monkeypatch):
    code = {
        "one": 'def f(x):\n    """Text."""\n    return x + 1  # a comment\n',
        "same": 'def f(x):\n    """Other text."""\n\n    return (x + 1)\n',
        "other": "def f(x):\n    return x + 2\n",
    }
    monkeypatch.setattr(versions, "_tree", lambda module: ast.parse(code[module]))
    digest = versions._meaning.__wrapped__
    assert digest("one") == digest("same")
    assert digest("one") != digest("other")


def test_models_without_their_package_are_left_out_and_their_rows_kept(monkeypatch, tmp_path, capsys):
    entry = Entry("net", "own", chain, batches.images, needs=("there_is_no_such_package",))
    assert entry.missing == ("there_is_no_such_package",)
    results = tmp_path / "support.json"
    support._write(results, [ROW])
    monkeypatch.setattr(support, "ROOT", tmp_path)
    monkeypatch.setattr(support, "RESULTS", results)
    monkeypatch.setattr(support, "PAGE", tmp_path / "support.md")
    monkeypatch.setattr("catalogue.catalogue", lambda: {"own/net": entry})
    monkeypatch.setattr("sys.argv", ["support.py"])
    support.main()
    assert "1 models are left out, as there is no there_is_no_such_package" in capsys.readouterr().out
    assert support._read(results) == {"own/net": ROW}
    assert "| net | good |" in (tmp_path / "support.md").read_text()


def test_cuts_alone_leave_what_is_known_of_the_promises():
    old = {**ROW, "version": "before", "steps": {"promise 1": 2.0}}
    new = {**ROW, "promises": {}, "largest": 0.6, "seconds": 0.1, "steps": {}}
    merged = support._merged(old, new)
    assert merged["promises"] == ROW["promises"]
    assert (merged["largest"], merged["version"], merged["seconds"]) == (0.6, "before", 1.0)
    assert support._merged(old, {**new, "reason": "refused now"})["version"] == ""
