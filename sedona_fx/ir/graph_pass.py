"""What every pass gets for nothing: its result is verified, and logged if ``SEDONA_FX_DEBUG`` asks for it.

``SEDONA_FX_DEBUG=1`` logs each pass that changed something, with the nodes it added and removed; ``=2`` also writes the
graphs before and after each pass to ``SEDONA_FX_DEBUG_DIR`` (default ``runs/debug``).
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

from torch import fx

from sedona_fx.ir.graph import info
from sedona_fx.ir.spec import Phase, verify

P = ParamSpec("P")
Pass = Callable[Concatenate[fx.GraphModule, P], fx.GraphModule]
_log = logging.getLogger("sedona_fx.passes")
_count = itertools.count()


def graph_pass(phase: Phase) -> Callable[[Pass[P]], Pass[P]]:
    """Decorate a pass: its result must satisfy the specification of `phase`, always, in production too."""

    def decorate(function: Pass[P]) -> Pass[P]:
        @functools.wraps(function)
        def run(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> fx.GraphModule:
            level = os.environ.get("SEDONA_FX_DEBUG", "0")
            if level in ("", "0"):
                return verify(function(gm, *args, **kwargs), phase)
            before, text = {node.name for node in gm.graph.nodes}, _text(gm)  # some passes work in place
            result = verify(function(gm, *args, **kwargs), phase)
            _log_changes(function.__name__, before, result, phase)
            if level > "1":
                _write(function.__name__, text, _text(result))
            return result

        return run

    return decorate


def _log_changes(name: str, before: set[str], result: fx.GraphModule, phase: Phase) -> None:
    after = {node.name for node in result.graph.nodes}
    added, removed = sorted(after - before), sorted(before - after)
    if added or removed:
        logging.basicConfig(level=logging.INFO)
        _log.info("%s -> %s: %d nodes; added %s; removed %s", name, phase, len(after), added, removed)


def _write(name: str, before: str, after: str) -> None:
    folder = Path(os.environ.get("SEDONA_FX_DEBUG_DIR", "runs/debug"))
    folder.mkdir(parents=True, exist_ok=True)
    number = next(_count)
    (folder / f"{number:03d}_{name}_before.txt").write_text(before)
    (folder / f"{number:03d}_{name}_after.txt").write_text(after)


def _text(gm: fx.GraphModule) -> str:
    lines = [f"{node.format_node()}    # {info(node).site}" for node in gm.graph.nodes if node.op != "output"]
    return "\n".join([*lines, f"return {gm.graph.output_node().args[0]}"]) + "\n"
