"""One row of the support table: what decoupling a model gives, and which promises hold for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import promises
import torch
from catalogue import Entry
from gradient_promise import gradients
from onnx_promise import onnx
from promises import Case, make_case
from support_classes import BUILDING, NUMBERS
from torch import nn
from trees import call, doubled

import sedona_fx
from sedona_fx.errors import SedonaError
from sedona_fx.ir.flow import predecessors
from sedona_fx.ir.graph import cut_points
from sedona_fx.ir.stretches.shares import Shares, node_work, work_before
from sedona_fx.passes.cuts import resolve
from sedona_fx.report.text import largest_block

Row = dict[str, Any]
KEPT, SKIPPED = "kept", "-"
LARGE = 700_000_000
"""Bytes of parameters above which a model is checked without a second net: three copies are all that memory holds."""


def measure(entry: Entry, tell: Callable[[Row], None], only: Sequence[str] = NUMBERS) -> Row:
    """Fill in a row; `tell` gets it after every step, so that what was found survives a crash of the next one.

    Args:
        entry: the model.
        tell: called with the row so far.
        only: the promises to check.
    """
    began: list[float] = []
    row: Row = {"family": entry.family, "name": entry.name, "note": entry.note, "promises": {}, "reason": ""}
    row |= {"doing": "", "steps": {}, "options": sorted(set(entry.options) - {"blocks"})}

    def step(doing: str) -> None:
        now = time.perf_counter()
        if row["doing"]:
            row["steps"][row["doing"]] = round(now - began[-1], 2)
        began.append(now)
        row["doing"], row["seconds"] = doing, round(now - began[0], 1)
        tell(row)

    step(BUILDING)
    try:
        case = make_case(entry)
    except SedonaError as error:
        row["reason"] = one_line(error)
        row["refused"] = bool(entry.refused) and entry.refused in str(error)
        step("")
        return row
    _describe(row, entry, case)
    for number in only:
        step(f"promise {number}")
        row["promises"][number] = _check(number, entry, case)
    step("")
    return row


def one_line(error: BaseException) -> str:
    """Return an error in one line without the folders of this machine."""
    text = str(error) if isinstance(error, SedonaError) else f"{type(error).__name__}: {error}"
    text = re.sub(r"\x1b\[[\d;]*m", "", " ".join(text.split()))  # colours of a terminal
    return re.sub(r"/\S*/(?:site-packages|lib/python[\d.]+)/", "", text)


def _describe(row: Row, entry: Entry, case: Case) -> None:
    graph, net = case.net.graph_module.graph, case.net
    row["parameters"] = sum(p.numel() for p in case.model.parameters())
    row["front_end"] = net.capture.front_end
    row["nodes"], row["cuts"], row["blocks"] = len(graph.nodes), sum(1 for _ in cut_points(graph)), len(net.blocks)
    row["largest"] = row["largest_without_heads"] = largest_block(net.costs)[1]
    row["why"] = one_line(SedonaError(case.fewer)) if case.fewer else _why(net)
    if f"the largest block has {_without_heads(net):.0%}" in row["why"]:  # heads alone make it large, the net says
        row["largest_without_heads"] = _without_heads(net)
    if entry.refused:
        row["reason"] = f"should have been refused ({entry.refused})"
    if net.capture.hosted:
        row["note"] = "; ".join(filter(None, [row["note"], "its host runs as Python: no ONNX"]))
    if _large(case.model):
        row["note"] = "; ".join(filter(None, [row["note"], "too large here for 4, 7 and 8"]))


def _without_heads(net: sedona_fx.Net) -> float:
    """Return the largest block's share of the work of the model itself; what trains nothing counts less."""
    graph = net.variants.analysed[True].graph
    ends, work = resolve(graph), node_work(graph, "flops")
    before = work_before([ends[cut] for cut in net.plan.cuts], predecessors(graph), work)
    return Shares(tuple(before), sum(work.values())).largest()


def _why(net: sedona_fx.Net) -> str:
    """Return what ``print(net)`` says of a large block: why it is large, and what would help."""
    told = [line.strip() for line in str(net).splitlines() if line.startswith(("  why: ", "  helps: "))]
    return "; ".join(told)


def _large(model: nn.Module) -> bool:
    return sum(p.numel() * p.element_size() for p in model.parameters()) > LARGE


def _runs_in_float64(entry: Entry) -> bool:
    """Whether the model itself can be run in float64, in which gradients are compared."""
    model, (inputs, _) = entry.make().double(), entry.pair()
    try:
        call(model, doubled(inputs))
    except Exception:
        return False
    return True


def _check(number: str, entry: Entry, case: Case) -> str:
    """Return ``kept``, ``-`` where a promise is not checked, or how it is broken."""
    large = _large(case.model)
    hosted = case.net.capture.hosted
    if (large and number in "478") or (entry.headless and number in "34") or (hosted and number == "8"):
        return SKIPPED
    checks: dict[str, Callable[[], str]] = {
        "1": lambda: promises.forward(case),
        "2": lambda: promises.names(case, None if large else entry.build),
        "3": lambda: promises.isolation(case),
        "4": lambda: gradients(entry, case.net),
        "5": lambda: promises.modes(case),
        "6": lambda: promises.untouched(case),
        "7": lambda: promises.whole(case),
        "8": lambda: onnx(*case.reset(False), case.inputs),
    }
    try:
        return checks[number]() or KEPT
    except Exception as error:
        return SKIPPED if number == "4" and not _runs_in_float64(entry) else one_line(error)
    finally:
        torch.set_grad_enabled(True)
