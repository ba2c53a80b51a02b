"""The decorator of every pass: it verifies the result, and logs the changes if ``SEDONA_FX_DEBUG`` is set.

``SEDONA_FX_DEBUG=1`` logs each pass that changed something, with the names of the nodes that it added and removed;
``SEDONA_FX_DEBUG=2`` also writes the graph before and after each pass to ``SEDONA_FX_DEBUG_DIR`` (``runs/debug`` by
default).
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
    """Decorate a pass so that its result is checked against the specification of `phase` on every call.

    The check is not limited to debugging: it runs in production too.

    Raises:
        GraphSpecError: by the decorated pass, if its result breaks the specification.
    """

    def decorate(function: Pass[P]) -> Pass[P]:
        @functools.wraps(function)
        def run(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> fx.GraphModule:
            level = os.environ.get("SEDONA_FX_DEBUG", "0")
            if level in ("", "0"):
                return verify(function(gm, *args, **kwargs), phase)
            # Taken before the call, since some passes work in place.
            names_before, text_before = {node.name for node in gm.graph.nodes}, _text(gm)
            result = verify(function(gm, *args, **kwargs), phase)
            _log_changes(function.__name__, names_before, result, phase)
            if level > "1":
                _write(function.__name__, text_before, _text(result))
            return result

        return run

    return decorate


def _log_changes(pass_name: str, names_before: set[str], result: fx.GraphModule, phase: Phase) -> None:
    names = {node.name for node in result.graph.nodes}
    added, removed = sorted(names - names_before), sorted(names_before - names)
    if added or removed:
        logging.basicConfig(level=logging.INFO)
        _log.info("%s -> %s: %d nodes; added %s; removed %s", pass_name, phase, len(names), added, removed)


def _write(pass_name: str, before: str, after: str) -> None:
    folder = Path(os.environ.get("SEDONA_FX_DEBUG_DIR", "runs/debug"))
    folder.mkdir(parents=True, exist_ok=True)
    number = next(_count)
    (folder / f"{number:03d}_{pass_name}_before.txt").write_text(before)
    (folder / f"{number:03d}_{pass_name}_after.txt").write_text(after)


def _text(gm: fx.GraphModule) -> str:
    lines = [f"{node.format_node()}    # {info(node).site}" for node in gm.graph.nodes if node.op != "output"]
    return "\n".join([*lines, f"return {gm.graph.output_node().args[0]}"]) + "\n"
