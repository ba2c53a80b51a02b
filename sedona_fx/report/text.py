"""The report that ``print(net)`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sedona_fx.search.problem.limits import MEASURES

if TYPE_CHECKING:
    from sedona_fx.net.net import Net


def human(count: float, unit: str = "") -> str:
    """Return a number with a metric prefix: ``1.7 M``, ``33.6 MB``."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}{unit}".strip()
        count /= 1000
    return f"{count:.3g} T{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a plain text table, the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def net_report(net: Net) -> str:
    """Return what a net consists of: a line a block with its cut, head, parameters, FLOPs, activation bytes, device.

    FLOPs are of one forward pass of the example batch; activation bytes are what autograd keeps of it for backward,
    the head included.
    """
    batch = next(iter(net.plan.inputs.values()), None)
    shape = tuple(batch["shape"]) if isinstance(batch, dict) and "shape" in batch else "?"
    source = net.plan.provenance.get("search", "plan")
    rows = []
    for block, cost in zip(net.blocks, net.costs, strict=True):
        last = block.index == len(net.blocks) - 1
        rows.append(
            [
                str(block.index),
                "the model's output" if last else f"behind {net.plan.cuts[block.index]}",
                "-" if last else (net.plan.heads[block.index] or "none"),
                human(cost.parameters),
                human(cost.flops),
                human(cost.activation_bytes, "B"),
                str(block.device),
            ]
        )
    head = ["block", "ends", "head", "parameters", "FLOPs", "activations", "device"]
    shared = shared_parameters(net)
    below = "".join(f"\n{name} in blocks {', '.join(map(str, blocks))}" for name, blocks in shared.items())
    if shared:
        below = f"\nshared parameters, stepped once, with the sum of their gradients, by their last block:{below}"
    if left_out := net.plan.provenance.get("left_out"):
        below += f"\nNone in the output, as no graph gives it: {', '.join(left_out)}"
    title = f"{net.plan.model}: {len(net.blocks)} blocks, cut by {source}, inputs {shape}"
    return f"{title}\n{table(head, rows)}{below}"


def shared_parameters(net: Net) -> dict[str, list[int]]:
    """Return the parameters that several blocks use, by name, each with its blocks; the last one steps it."""
    users: dict[int, list[int]] = {}
    for block in net.blocks:
        for parameter in block.base_parameters():
            users.setdefault(id(parameter), []).append(block.index)
    return {name: users[id(p)] for name, p in net.model.named_parameters() if len(users.get(id(p), ())) > 1}


def in_units(measure: str, values: Sequence[float]) -> tuple[list[float], str]:
    """Return values in the unit in which people read them, and its name: MiB, MFLOPs, ms, ..., by the largest."""
    largest = max(values, default=0.0)
    steps = {"bytes": (2**10, ["B", "KiB", "MiB", "GiB"]), "FLOPs": (1e3, ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs"])}
    base, names = steps.get(MEASURES[measure], (1e-3, ["s", "ms"]))
    scale, unit = 1.0, names[0]
    for name in names[1:]:
        if (largest / scale >= base) if base > 1 else largest / scale < 1:
            scale, unit = scale * base, name
    return [value / scale for value in values], unit
