"""What every pass gets for nothing: its result is checked, and shown if asked for."""

import logging

import chain
import pytest
import torch

from sedona_fx.errors import GraphSpecError
from sedona_fx.ir.graph import info
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase
from sedona_fx.passes import lower, partition, prune, relax, strip


def test_the_result_is_checked_and_not_the_input():
    @graph_pass(Phase.ANALYSED)
    def broken(gm):
        info(next(iter(gm.graph.nodes))).cut = "x"
        return gm

    with pytest.raises(GraphSpecError, match=r"analysed graph at node 'x' .*a cut point is one float tensor"):
        broken(chain.graphs().train)


def test_debug_levels(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sedona_fx.passes")
    gm = chain.graphs().train
    chain.lowered(gm)
    assert not caplog.records
    monkeypatch.setenv("SEDONA_FX_DEBUG_DIR", str(tmp_path / "debug"))
    monkeypatch.setenv("SEDONA_FX_DEBUG", "1")
    relaxed = chain.relaxed(gm)
    (record,) = caplog.records
    assert "relax -> relaxed" in record.getMessage()
    assert "added" in record.getMessage()
    assert "sedona_split_points_0" in record.getMessage()
    assert not (tmp_path / "debug").exists()
    monkeypatch.setenv("SEDONA_FX_DEBUG", "2")
    caplog.clear()
    lowered = lower(prune(relaxed, {"a": 0}))
    strip(lowered)
    names = sorted(path.name.partition("_")[2] for path in (tmp_path / "debug").iterdir())
    assert names == sorted(f"{p}_{when}.txt" for p in ("prune", "lower", "strip") for when in ("before", "after"))
    after = next(path for path in (tmp_path / "debug").iterdir() if path.name.endswith("lower_after.txt"))
    assert "torch.detach" in after.read_text() or "detach" in after.read_text()
    assert [r.getMessage().split(" ")[0] for r in caplog.records] == ["prune", "lower", "strip"]


@pytest.mark.parametrize("phase", ["analysed", "relaxed", "pruned", "lowered", "block", "stripped"])
def test_every_phase_prints_and_runs(phase, capsys):
    x, _ = chain.batch()
    gm = chain.graphs().train
    relaxed = relax(gm, chain.heads(2))
    pruned = prune(relaxed, {"b": 1})
    lowered = lower(pruned)
    block = partition(lowered)[0].module
    graphs = {
        "analysed": gm,
        "relaxed": relaxed,
        "pruned": pruned,
        "lowered": lowered,
        "block": block,
        "stripped": strip(lowered),
    }
    made = graphs[phase]
    made.graph.lint()
    print(made)  # noqa: T201
    made.print_readable()
    assert "def forward" in capsys.readouterr().out
    output = made(x)
    final = output[-1] if isinstance(output, tuple) else output
    if phase != "block":
        assert torch.equal(final, chain.model()(x))
